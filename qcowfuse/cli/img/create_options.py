"""The options of ``qcowfuse-img create`` as text: ``name=value,...`` and sizes.

1. Names, values and defaults are those of qemu-img; whatever is not known is refused by name, never ignored.
2. A passphrase is never one of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ...tools.create import (
    COMPRESSION_DEFLATE,
    COMPRESSION_ZSTD,
    MAX_DISK_SIZE,
    CreateError,
    CreateOptions,
    Preallocation,
)

if TYPE_CHECKING:
    from ...tools.create_encryption import Encryption

_SUFFIXES = {suffix: 1 << 10 * power for power, suffix in enumerate(("", "k", "m", "g", "t", "p", "e"))}
_QCOW2_OPTIONS = frozenset(
    str.split(
        "cluster_size compat refcount_bits extended_l2 lazy_refcounts compression_type preallocation data_file "
        "data_file_raw"
    )
)
_COMMON_OPTIONS = frozenset({"backing_file", "backing_fmt", "size"})
_ENCRYPTION_OPTIONS = frozenset(
    f"encrypt.{name}"
    for name in str.split("format cipher-alg cipher-mode ivgen-alg ivgen-hash-alg hash-alg iter-time key-secret")
)


def parse_size(text: str) -> int:
    """``1G``, ``1.5k``, ``4096`` in bytes. Raises CreateError."""
    match = re.fullmatch(r"(\d{1,20}(?:\.\d{1,20})?)([bkmgtpe]?)", text.strip().lower(), re.ASCII)
    if match is None:
        raise CreateError(f"bad size {text!r}: expected bytes, or a number with a suffix: k, M, G, T, P, E")
    whole, _, decimals = match[1].partition(".")
    n_bytes: int = int(whole + decimals) * _SUFFIXES[match[2].removeprefix("b")] // 10 ** len(decimals)
    if n_bytes > MAX_DISK_SIZE:
        raise CreateError(f"size {text} is too large: expected less than 8 EiB")
    return n_bytes


def known_options(format_name: str) -> tuple[str, ...]:
    """What a list may hold for a format, each with ``=`` behind it."""
    known = _COMMON_OPTIONS | _ENCRYPTION_OPTIONS | (_QCOW2_OPTIONS if format_name == "qcow2" else frozenset())
    return tuple(sorted(f"{name}=" for name in known))


def _switch(name: str, text: str) -> bool:
    if text not in ("on", "off"):
        raise CreateError(f"{name}={text}: expected on or off")
    return text == "on"


def _unknown(name: str, format_name: str, known: Iterable[str]) -> str:
    names = [text.rstrip("=") for text in known]
    if name in ("help", "?"):  # qemu-img's way to ask
        return f"options for format {format_name}: {', '.join(names)} (qcowfuse-img create --help says more)"
    from ..near_misses import did_you_mean

    return f"unknown option {name} for format {format_name}{did_you_mean(name, names)}"


def parse_create_options(
    format_name: str,
    lists: Iterable[str],
    *,
    size: str | None = None,
    backing_file: str | None = None,
    backing_format: str | None = None,
) -> CreateOptions:
    """From ``lists`` of ``name=value,...`` (a doubled comma is a plain one); the other arguments go before what they
    say. Raises CreateError."""
    given: dict[str, str] = {}
    known = known_options(format_name)
    for text in lists:
        for part in re.split(r"(?<!,),(?!,)", text):
            name, _, value = part.replace(",,", ",").partition("=")
            if f"{name}=" not in known:
                raise CreateError(_unknown(name, format_name, known))
            given[name] = value
    size = size if size is not None else given.get("size")
    cluster_size = parse_size(given.get("cluster_size", "64k"))
    _require(cluster_size.bit_count() == 1, "cluster_size: expected a power of two from 512 to 2M")
    version = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}.get(given.get("compat", "1.1"))
    _require(version is not None, f"compat={given.get('compat')}: expected 0.10 or 1.1")
    width = given.get("refcount_bits", "16")
    _require(width in ("1", "2", "4", "8", "16", "32", "64"), f"refcount_bits={width}: expected 1, 2, 4 ... 64")
    compression = given.get("compression_type", "zlib")
    _require(compression in ("zlib", "zstd"), f"compression_type={compression}: expected zlib or zstd")
    preallocation = given.get("preallocation", "off")
    modes = [mode.value for mode in Preallocation]
    _require(preallocation in modes, f"preallocation={preallocation}: expected {', '.join(modes)}")
    assert version is not None
    options = CreateOptions(
        format_name=format_name,
        size=None if size is None else parse_size(size),
        cluster_bits=cluster_size.bit_length() - 1,
        version=version,
        refcount_order=int(width).bit_length() - 1,
        extended_l2=_switch("extended_l2", given.get("extended_l2", "off")),
        lazy_refcounts=_switch("lazy_refcounts", given.get("lazy_refcounts", "off")),
        compression_type=COMPRESSION_ZSTD if compression == "zstd" else COMPRESSION_DEFLATE,
        backing_file=backing_file if backing_file is not None else given.get("backing_file"),
        backing_format=backing_format if backing_format is not None else given.get("backing_fmt"),
        preallocation=Preallocation(preallocation),
        data_file=given.get("data_file"),
        data_file_raw=_switch("data_file_raw", given.get("data_file_raw", "off")),
        encryption=_parse_encryption(format_name, given),
    )
    options.require_possible()
    return options


def _parse_encryption(format_name: str, given: Mapping[str, str]) -> Encryption | None:
    """From options by name, those that are not about encryption included. Raises CreateError."""
    if "encrypt.key-secret" in given:
        raise CreateError("encrypt.key-secret: secrets are QEMU's; give the passphrase with --key-file")
    chosen = {name.removeprefix("encrypt."): value for name, value in given.items() if name in _ENCRYPTION_OPTIONS}
    if not chosen:
        return None
    from ...tools.create_encryption import (
        CIPHER_MODES,
        CIPHERS,
        HASHES,
        IV_GENERATORS,
        MAX_ITER_TIME,
        CipherSpec,
        Encryption,
        require_possible,
    )

    method = chosen.pop("format", "")
    known = ("aes", "luks") if format_name == "qcow2" else ("aes",)
    if method not in known:
        found = f"encrypt.format={method}" if method else "encrypt.format is missing"
        raise CreateError(f"{found}: expected {' or '.join(known)}")
    if method == "aes":
        if chosen:
            raise CreateError(f"encrypt.{min(chosen)} needs encrypt.format=luks")
        return Encryption()

    def choice(name: str, values: tuple[str, ...], default: str | None) -> str | None:
        value = chosen.get(name, default)
        if value is not None and value not in values:
            raise CreateError(f"encrypt.{name}={value}: expected {', '.join(values)}")
        return value

    generator = choice("ivgen-alg", IV_GENERATORS, "plain64")
    spec = CipherSpec(
        choice("cipher-alg", tuple(sorted(CIPHERS)), "aes-256") or "",
        choice("cipher-mode", CIPHER_MODES, "xts") or "",
        generator or "",
        choice("ivgen-hash-alg", tuple(HASHES), "sha256" if generator == "essiv" else None),
    )
    hash_name = choice("hash-alg", tuple(HASHES), "sha256") or ""
    iter_time = chosen.get("iter-time", "2000")
    if not iter_time.isascii() or not iter_time.isdigit() or not 0 < int(iter_time[:9]) <= MAX_ITER_TIME:
        raise CreateError(f"encrypt.iter-time={iter_time}: expected milliseconds, 1 to {MAX_ITER_TIME}")
    require_possible(spec, hash_name)
    return Encryption(spec, hash_name, int(iter_time))


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise CreateError(text)
