"""The image matrix: what qemu-img and qemu-io can build, as a list of specifications with ids.

1. A specification is a chain of layers, the lowest first; each layer is created and then goes through its steps.
2. Everything is deterministic: contents depend on the layer's name and the steps' numbers.
3. ``build`` only uses QEMU's tools, but for single bytes that no tool writes (feature bits, sizes).
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from qcowfuse.driver.options import OpenOptions

from . import qemu

KIB = 1024
MIB = 1024 * KIB
TIB = 1024 * 1024 * MIB


@dataclass(frozen=True, slots=True)
class Built:
    """A layer while it is being built: where it is and what it is."""

    path: Path
    format_name: str
    size: int


Step = Callable[[Built], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a chain. ``name`` is its path below the image's folder; ``options`` those of qemu-img create.

    ``make`` builds the file instead of qemu-img create where it is given. ``data_file`` names an external data file
    in the same folder; the image names it by its whole path.
    """

    format_name: str
    size: int
    options: str = ""
    name: str = ""
    steps: tuple[Step, ...] = ()
    make: Callable[[Built], None] | None = None
    absolute_backing: bool = False
    data_file: str = ""


@dataclass(frozen=True, slots=True)
class ImageSpec:
    """An image: its layers, the lowest first.

    ``backing_format`` and ``allows_folder`` (all that is built there) are what qcowfuse has to be told. ``large``:
    too large to be compared whole; the places in ``windows`` (multiples of 64 KiB) are.
    """

    id: str
    layers: tuple[Layer, ...]
    backing_format: str | None = None
    allows_folder: bool = False
    windows: tuple[int, ...] = ()

    @property
    def format_name(self) -> str:
        """QEMU's name of the top layer's format."""
        return self.layers[-1].format_name

    @property
    def has_raw_data_file(self) -> bool:
        """Whether the top layer's data file, as it stands, must be the disk."""
        return "data_file_raw" in self.layers[-1].options

    @property
    def large(self) -> bool:
        """Whether only windows can be compared."""
        return bool(self.windows)


@dataclass(frozen=True, slots=True)
class BuiltImage:
    """A built image: the file to open, its format, the files below it, its external data file, and what has to be
    said when it is opened, as options and as words of a command line."""

    path: Path
    format_name: str
    backing_paths: tuple[Path, ...]
    data_path: Path | None
    options: OpenOptions
    words: tuple[str, ...]


def build(spec: ImageSpec, folder: Path) -> BuiltImage:
    """Build ``spec`` in ``folder``, which must be empty. Raises QemuError."""
    below: Built | None = None
    paths: list[Path] = []
    for number, layer in enumerate(spec.layers):
        name = layer.name or f"layer{number}.{layer.format_name}"
        built = Built(folder / name, layer.format_name, layer.size)
        built.path.parent.mkdir(parents=True, exist_ok=True)
        options = layer.options
        data_path = built.path.with_name(layer.data_file) if layer.data_file else None
        if data_path is not None:
            options = f"data_file={data_path},{options}".removesuffix(",")
        if layer.make is not None:
            layer.make(built)
        elif below is None:
            qemu.create(built.path, layer.format_name, layer.size, options=options)
        else:
            backing = below.path if layer.absolute_backing else _relative(below.path, built.path.parent)
            qemu.create(
                built.path,
                layer.format_name,
                layer.size,
                options=options,
                backing=str(backing),
                backing_format=below.format_name,
            )
        for step in layer.steps:
            step(built)
        paths += [built.path] if data_path is None else [data_path, built.path]
        below = built
    n_own = 1 if data_path is None else 2
    needed = OpenOptions(backing_format=spec.backing_format, allow_dirs=(str(folder),) if spec.allows_folder else ())
    words = [f"--allow-dir={folder}" for folder in needed.allow_dirs]
    words += [f"--backing-format={spec.backing_format}"] if spec.backing_format is not None else []
    return BuiltImage(paths[-1], spec.format_name, tuple(paths[:-n_own]), data_path, needed, tuple(words))


def _relative(path: Path, folder: Path) -> Path:
    up = 0
    while not path.is_relative_to(folder):
        folder = folder.parent
        up += 1
    return Path(*[".."] * up) / path.relative_to(folder)


# Steps


def io(*commands: str) -> Step:
    """Run qemu-io commands on the layer."""

    def step(built: Built) -> None:
        qemu.io(built.path, commands, built.format_name)

    return step


def fill(seed: int, n_writes: int = 16, longest: int = 96 * KIB) -> Step:
    """Write ``n_writes`` patterns and one run of random bytes at random places on sector boundaries."""

    def step(built: Built) -> None:
        if not built.size:
            return
        rng = random.Random(f"{built.path.name} {seed}")
        sectors = built.size // 512
        commands = []
        for _ in range(n_writes):
            n_sectors = rng.randint(1, max(min(longest // 512, sectors), 1))
            first = rng.randrange(sectors - n_sectors + 1)
            commands.append(f"write -P {rng.randint(1, 255)} {first * 512} {n_sectors * 512}")
        source = built.path.with_name(built.path.name + ".random")
        n_sectors = min(sectors, 64)
        source.write_bytes(rng.randbytes(n_sectors * 512))
        first = rng.randrange(sectors - n_sectors + 1)
        commands.append(f"write -s {source} {first * 512} {n_sectors * 512}")
        try:
            qemu.io(built.path, commands, built.format_name)
        finally:
            source.unlink()

    return step


def fill_raw(seed: int) -> Callable[[Built], None]:
    """Make a raw file of exactly ``size`` bytes: half text-like runs, some random bytes, some zeroes."""

    def make(built: Built) -> None:
        built.path.write_bytes(compressible(seed, built.size))

    return make


def compressible(seed: int, size: int) -> bytes:
    """Deterministic bytes that compress well in some places and not at all in others."""
    rng = random.Random(seed)
    parts: list[bytes] = []
    length = 0
    while length < size:
        kind = rng.randrange(4)
        n_bytes = rng.randint(1, 100_000)
        if kind == 0:
            part = bytes(n_bytes)
        elif kind == 1:
            part = rng.randbytes(min(n_bytes, 20_000))
        elif kind == 2:
            part = bytes([rng.randrange(256)]) * n_bytes
        else:
            part = rng.randbytes(97) * (n_bytes // 97 + 1)
        parts.append(part)
        length += len(part)
    return b"".join(parts)[:size]


def compress_from_raw(seed: int, options: str = "") -> Callable[[Built], None]:
    """Make the layer with ``qemu-img convert -c`` of a raw file."""

    def make(built: Built) -> None:
        source = built.path.with_name(built.path.name + ".source")
        source.write_bytes(compressible(seed, built.size))
        try:
            qemu.convert(source, built.path, built.format_name, source_format="raw", options=options, compressed=True)
        except qemu.QemuError:
            # QEMU 10.0's convert -c to version 1 says nothing, does everything and ends with 1.
            if built.format_name != "qcow" or not qemu.is_same(source, built.path, "raw", "qcow"):
                raise
        source.unlink()

    return make


def empty_v1(cluster_bits: int, l2_bits: int) -> Callable[[Built], None]:
    """Make an empty version 1 image of a geometry that qemu-img has no option for."""

    def make(built: Built) -> None:
        n_l1 = -(-built.size // (1 << (cluster_bits + l2_bits)))
        header = struct.pack(">4sIQIIQBBHIQ", b"QFI\xfb", 1, 0, 0, 0, built.size, cluster_bits, l2_bits, 0, 0, 48)
        n_bytes = -(-(48 + n_l1 * 8) // 512) * 512
        built.path.write_bytes(header.ljust(n_bytes, b"\0"))

    return make


def snapshot(name: str) -> Step:
    """Take an internal snapshot: all clusters are shared from then on."""

    def step(built: Built) -> None:
        qemu.must_run("qemu-img", "snapshot", "-c", name, built.path)

    return step


def delete_snapshot(name: str) -> Step:
    """Delete an internal snapshot."""

    def step(built: Built) -> None:
        qemu.must_run("qemu-img", "snapshot", "-d", name, built.path)

    return step


def apply_snapshot(name: str) -> Step:
    """Go back to an internal snapshot."""

    def step(built: Built) -> None:
        qemu.must_run("qemu-img", "snapshot", "-a", name, built.path)

    return step


def bitmap(name: str, *options: str) -> Step:
    """Add a persistent bitmap."""

    def step(built: Built) -> None:
        qemu.must_run("qemu-img", "bitmap", "--add", *options, built.path, name)

    return step


def resize(size: int, *options: str) -> Step:
    """Give the disk another size."""

    def step(built: Built) -> None:
        qemu.must_run("qemu-img", "resize", "-q", "-f", built.format_name, *options, built.path, str(size))

    return step


def amend(options: str) -> Step:
    """Change options of an image that exists: ``qemu-img amend -o``."""

    def step(built: Built) -> None:
        qemu.must_run("qemu-img", "amend", "-q", "-f", built.format_name, "-o", options, built.path)

    return step


def unknown_header_parts(built: Built) -> None:
    """Make the header of a version 3 image longer than anyone knows, and give it an extension that nobody knows."""
    with built.path.open("r+b") as file:
        head = file.read(112)
        cluster_size = 1 << int.from_bytes(head[20:24], "big")
        rest = file.read(cluster_size - 112)
        more = bytes(range(0xA0, 0xA0 + 24)) + bytes.fromhex("c0ffee00 0000000b") + b"hello world" + bytes(5)
        assert not any(rest[-len(more) :]), "no room for more"
        backing_offset = int.from_bytes(head[8:16], "big")
        if backing_offset:
            head = head[:8] + (backing_offset + len(more)).to_bytes(8, "big") + head[16:]
        head = head[:100] + (112 + 24).to_bytes(4, "big") + head[104:]
        file.seek(0)
        file.write((head + more + rest)[:cluster_size])


def poke(host_offset: int, data: bytes) -> Step:
    """Put bytes into the file itself."""

    def step(built: Built) -> None:
        with built.path.open("r+b") as file:
            file.seek(host_offset)
            file.write(data)

    return step


def set_feature(host_offset: int, bit: int) -> Step:
    """Set a feature bit in the header: field 72 incompatible, 80 compatible, 88 autoclear."""

    def step(built: Built) -> None:
        with built.path.open("r+b") as file:
            file.seek(host_offset)
            value = int.from_bytes(file.read(8), "big") | 1 << bit
            file.seek(host_offset)
            file.write(value.to_bytes(8, "big"))

    return step


def forget_backing_format(built: Built) -> None:
    """Make the backing format extension one that nobody knows."""
    with built.path.open("r+b") as file:
        start = file.read(4096)
        file.seek(start.index(bytes.fromhex("e2792aca")))
        file.write(bytes.fromhex("e2792acb"))


# The list

CLUSTER_SIZES = tuple(1 << bits for bits in range(9, 22))
SIZE = 2 * MIB


def _size_name(n_bytes: int) -> str:
    for unit, name in ((TIB, "T"), (MIB, "M"), (KIB, "k")):
        if n_bytes >= unit and n_bytes % unit == 0:
            return f"{n_bytes // unit}{name}"
    return str(n_bytes)


def _one(name: str, size: int = SIZE, options: str = "", *steps: Step, format_name: str = "qcow2") -> ImageSpec:
    return ImageSpec(name, (Layer(format_name, size, options, steps=steps or (fill(1),)),))


def _plain() -> Iterable[ImageSpec]:
    for cluster_size in CLUSTER_SIZES:
        size = max(SIZE, 2 * cluster_size + 512)
        for version, compat in (("v2", "0.10"), ("v3", "1.1")):
            yield _one(
                f"{version}-cluster-{_size_name(cluster_size)}", size, f"compat={compat},cluster_size={cluster_size}"
            )
    for bits in (1, 2, 4, 8, 16, 32, 64):
        for cluster_size in (512, 4 * KIB, 64 * KIB):
            name = f"v3-refcount-{bits}-cluster-{_size_name(cluster_size)}"
            yield _one(name, SIZE, f"refcount_bits={bits},cluster_size={cluster_size}")
    for mode in ("metadata", "falloc", "full"):
        for cluster_size in (512, 64 * KIB, 2 * MIB):
            name = f"v3-preallocation-{mode}-cluster-{_size_name(cluster_size)}"
            yield _one(name, 4 * MIB, f"preallocation={mode},cluster_size={cluster_size}")
    yield _one("v2-preallocation-metadata", SIZE, "compat=0.10,preallocation=metadata")
    yield _one("v3-preallocation-off", SIZE, "preallocation=off", io())
    yield _one("v3-lazy-refcounts-clean", SIZE, "lazy_refcounts=on")
    for mode in ("falloc", "full"):
        yield _one(f"v3-preallocation-{mode}-extended", SIZE, f"preallocation={mode},extended_l2=on")
    yield _one("v2-preallocation-full", SIZE, "compat=0.10,preallocation=full")


def _sizes() -> Iterable[ImageSpec]:
    yield _one("v3-size-0", 0, "", io())
    for size in (512, 4096, 65536 - 512, MIB + 512, 3 * MIB - 512):
        yield _one(f"v3-size-{size}", size)
        yield _one(f"v2-size-{size}-cluster-2M", size, "compat=0.10,cluster_size=2M")
        yield _one(f"v3-size-{size}-cluster-512", size, "cluster_size=512")
    for cluster_size in (512, 64 * KIB):
        odd = (MIB + 700).to_bytes(8, "big")
        yield ImageSpec(
            f"v3-size-no-sectors-cluster-{_size_name(cluster_size)}",
            (Layer("qcow2", MIB + 1024, f"cluster_size={cluster_size}", steps=(fill(1), poke(24, odd))),),
        )
    yield _one("v3-grown", MIB, "cluster_size=512", fill(1), resize(5 * MIB))
    yield _one("v2-grown", MIB, "compat=0.10,cluster_size=4k", fill(1), resize(3 * MIB + 512))
    yield _one("v3-grown-preallocated", MIB, "", fill(1), resize(3 * MIB, "--preallocation=metadata"), fill(2, 4))
    yield _one("v3-extended-grown", MIB + 512, "extended_l2=on", fill(1), resize(3 * MIB))
    yield _one("v3-extended-shrunk", 3 * MIB, "extended_l2=on", fill(1), resize(MIB + 512, "--shrink"))
    yield _one("v3-shrunk-and-grown", 4 * MIB, "", fill(1), resize(MIB, "--shrink"), resize(2 * MIB))
    yield _one("v3-shrunk", 4 * MIB, "cluster_size=4k", fill(1), resize(MIB + 512, "--shrink"))


def _zeroes() -> Iterable[ImageSpec]:
    for cluster_size in (512, 4 * KIB, 64 * KIB):
        unit = max(cluster_size, 4 * KIB)
        plain = io(f"write -z {unit} {unit * 3}", f"write -z -u {unit * 6} {unit * 4}", "write -z 1000448 512")
        options = f"cluster_size={cluster_size}"
        yield _one(f"v3-zero-clusters-{_size_name(cluster_size)}", SIZE, options, fill(1), plain, fill(2, 3))
        yield _one(
            f"v3-zero-clusters-preallocated-{_size_name(cluster_size)}",
            SIZE,
            options + ",preallocation=metadata",
            fill(1, 8),
            plain,
        )
        yield _one(f"v3-discarded-{_size_name(cluster_size)}", SIZE, options, fill(1), io(f"discard 0 {MIB}"))
    yield _one("v3-all-zero-preallocated", SIZE, "preallocation=metadata", io(f"write -z 0 {SIZE}"))
    yield _one("v2-zero-writes", SIZE, "compat=0.10", fill(1), io("write -z 64k 192k"), io("discard 512k 512k"))
    base = Layer("raw", SIZE, make=fill_raw(3))
    for version, compat in (("v2", "0.10"), ("v3", "1.1")):
        yield ImageSpec(
            f"{version}-zeroes-over-backing",
            (
                base,
                Layer(
                    "qcow2",
                    SIZE,
                    f"compat={compat},cluster_size=4k",
                    steps=(io("write -z 4k 64k", "write -z -u 128k 64k", "discard 512k 64k", "write -z 777728 512"),),
                ),
            ),
        )


def _compressed() -> Iterable[ImageSpec]:
    for cluster_size in (512, 4 * KIB, 64 * KIB, 512 * KIB, 2 * MIB):
        cluster = f"cluster_size={cluster_size}"
        for name, options in (
            ("v2-deflate", f"compat=0.10,{cluster}"),
            ("v3-deflate", cluster),
            ("v3-zstd", f"compression_type=zstd,{cluster}"),
        ):
            size = max(SIZE, cluster_size) + MIB + 512
            make = compress_from_raw(cluster_size, options)
            label = f"{name}-cluster-{_size_name(cluster_size)}"
            yield ImageSpec(f"{label}-compressed", (Layer("qcow2", size, make=make),))
            if cluster_size in (512, 64 * KIB):
                yield ImageSpec(
                    f"{label}-compressed-rewritten",
                    (Layer("qcow2", size, make=make, steps=(fill(1),)),),
                )
    yield _one("v3-compressed-writes", SIZE, "cluster_size=4k", *_compressed_writes(4 * KIB), fill(1, 4))
    yield _one("v3-zstd-compressed-writes", SIZE, "compression_type=zstd", *_compressed_writes(64 * KIB), fill(1, 4))
    yield ImageSpec(
        "v3-compressed-shared-by-snapshot",
        (
            Layer(
                "qcow2",
                SIZE,
                make=compress_from_raw(5, "cluster_size=4k"),
                steps=(snapshot("before"), fill(1, 4)),
            ),
        ),
    )


def _compressed_writes(cluster_size: int) -> tuple[Step, ...]:
    return (io(*(f"write -c -P {number + 1} {number * 3 * cluster_size} {cluster_size}" for number in range(9))),)


def _extended() -> Iterable[ImageSpec]:
    """Extended L2 entries: 32 subclusters a cluster."""
    for cluster_size, size in ((16 * KIB, SIZE), (64 * KIB, SIZE), (2 * MIB, 8 * MIB)):
        options = f"extended_l2=on,cluster_size={cluster_size}"
        label = f"v3-extended-{_size_name(cluster_size)}"
        yield _one(label, size, options, fill(1))
        yield _one(f"{label}-metadata", size, f"{options},preallocation=metadata", fill(1, 8))
        yield _one(f"{label}-snapshot", size, options, fill(1), snapshot("one"), fill(2, 4))
        yield _one(
            f"{label}-zeroes", size, options, fill(1), io("write -z 0 300k", "write -z -u 512k 100k"), fill(2, 3)
        )
        yield ImageSpec(f"{label}-compressed", (Layer("qcow2", size, make=compress_from_raw(1, options)),))
        below = Layer("qcow2", size - 512 * KIB, "cluster_size=4k", steps=(fill(1),))
        yield ImageSpec(f"{label}-over-v3", (below, Layer("qcow2", size, options, steps=(fill(2, 5),))))
    above = Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(2, 5),))
    below = Layer("qcow2", SIZE, "extended_l2=on,cluster_size=64k", steps=(fill(1),))
    yield ImageSpec("v3-over-v3-extended", (below, above))


def _data_files() -> Iterable[ImageSpec]:
    """External data files, plain and raw, with standard and extended L2 entries."""
    plain = io("write -z 64k 300k", "write -z -u 512k 200k", "discard 1M 256k")
    for cluster_size in (512, 4 * KIB, 64 * KIB, 2 * MIB):
        for is_extended in (False, True)[: 2 if cluster_size >= 64 * KIB else 1]:
            size = max(SIZE, 2 * cluster_size + 512)
            options = f"cluster_size={cluster_size}" + (",extended_l2=on" if is_extended else "")
            for name, more in (("data-file", ""), ("data-file-raw", ",data_file_raw=on")):
                label = f"v3-{name}-{'extended-' if is_extended else 'cluster-'}{_size_name(cluster_size)}"
                layer = Layer("qcow2", size, options + more, steps=(fill(1, 8),), data_file="data.raw")
                yield ImageSpec(label, (layer,))
                if cluster_size in (4 * KIB, 64 * KIB):
                    yield ImageSpec(f"{label}-zeroes", (replace(layer, steps=(fill(1, 8), plain, fill(2, 3))),))
            if cluster_size == 64 * KIB:
                for mode in ("metadata", "falloc", "full"):
                    layer = Layer(
                        "qcow2", size, f"{options},preallocation={mode}", steps=(fill(1, 8),), data_file="data.raw"
                    )
                    yield ImageSpec(f"v3-data-file-{mode}{'-extended' if is_extended else ''}", (layer,))
    for size in (0, 512, MIB + 512):
        for name, options in (("data-file", ""), ("data-file-raw", "data_file_raw=on")):
            steps: tuple[Step, ...] = (fill(1, 8),) if size else ()
            yield ImageSpec(
                f"v3-{name}-size-{size}", (Layer("qcow2", size, options, steps=steps, data_file="data.raw"),)
            )
    for name, options in (("data-file", ""), ("data-file-raw", "data_file_raw=on")):
        steps = (fill(1, 8), resize(3 * MIB), fill(2, 4))
        yield ImageSpec(f"v3-{name}-grown", (Layer("qcow2", MIB + 512, options, steps=steps, data_file="data.raw"),))
    below = Layer("qcow2", MIB + 512, "cluster_size=4k", steps=(fill(1),), data_file="below.raw")
    for options in ("cluster_size=64k", "cluster_size=64k,extended_l2=on"):
        label = "data-file-extended" if "extended" in options else "data-file"
        above = Layer("qcow2", SIZE, options, steps=(fill(2, 5), plain), data_file="above.raw")
        yield ImageSpec(f"v3-{label}-over-v3-data-file", (below, above))
    yield ImageSpec("v3-over-data-file", (below, Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(2, 5),))))


def _version1() -> Iterable[ImageSpec]:
    for size in (512, 65536, MIB + 512, 4 * MIB):
        yield _one(f"v1-size-{size}", size, "", format_name="qcow")
    yield ImageSpec("v1-compressed", (Layer("qcow", SIZE + 512, make=compress_from_raw(1)),))
    yield ImageSpec("v1-compressed-rewritten", (Layer("qcow", SIZE, make=compress_from_raw(2), steps=(fill(1),)),))
    for cluster_bits, l2_bits in ((9, 6), (9, 13), (12, 6), (16, 6), (16, 13)):
        yield ImageSpec(
            f"v1-cluster-bits-{cluster_bits}-l2-bits-{l2_bits}",
            (Layer("qcow", SIZE + 512, make=empty_v1(cluster_bits, l2_bits), steps=(fill(1),)),),
        )
    raw = Layer("raw", SIZE, make=fill_raw(4))
    yield ImageSpec("v1-over-raw", (raw, Layer("qcow", SIZE, steps=(fill(1, 6),))))
    yield ImageSpec(
        "v1-over-odd-raw", (Layer("raw", MIB + 123, make=fill_raw(5)), Layer("qcow", SIZE, steps=(fill(1, 6),)))
    )
    lower = Layer("qcow", SIZE, steps=(fill(1),))
    yield ImageSpec("v1-over-v1", (lower, Layer("qcow", SIZE, steps=(fill(2, 5),))), backing_format="auto")
    v3 = Layer("qcow2", SIZE, steps=(fill(1),))
    yield ImageSpec("v1-over-v3", (v3, Layer("qcow", SIZE, steps=(fill(2, 5),))), backing_format="qcow2")
    yield ImageSpec("v3-over-v1", (lower, Layer("qcow2", SIZE, steps=(fill(2, 5),))))
    yield ImageSpec(
        "v3-over-v1-compressed",
        (
            Layer("qcow", SIZE, make=compress_from_raw(3)),
            Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(2, 5),)),
        ),
    )


def _chains() -> Iterable[ImageSpec]:
    bottom = Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(1),))
    for low, middle, high in ((512, 64 * KIB, 4 * KIB), (2 * MIB, 512, 64 * KIB), (4 * KIB, 4 * KIB, 2 * MIB)):
        sizes = (low, middle, high)
        yield ImageSpec(
            "chain-" + "-".join(_size_name(size) for size in sizes),
            tuple(
                Layer("qcow2", SIZE, f"cluster_size={size}", steps=(fill(number, 6),))
                for number, size in enumerate(sizes)
            ),
        )
    yield ImageSpec(
        "chain-v2-v3",
        (Layer("qcow2", SIZE, "compat=0.10", steps=(fill(1),)), Layer("qcow2", SIZE, steps=(fill(2, 5),))),
    )
    for size in (512, MIB, MIB + 512, 3 * MIB):
        below = Layer("qcow2", size, "cluster_size=4k", steps=(fill(1),))
        yield ImageSpec(f"over-backing-of-{size}", (below, Layer("qcow2", SIZE, steps=(fill(2, 5),))))
        yield ImageSpec(f"empty-over-backing-of-{size}", (below, Layer("qcow2", SIZE)))
    yield ImageSpec(
        "chain-short-in-the-middle",
        (
            bottom,
            Layer("qcow2", MIB - 512, "cluster_size=512", steps=(fill(2, 4),)),
            Layer("qcow2", SIZE, steps=(fill(3, 4),)),
        ),
    )
    for size in (1, 511, 513, MIB + 123, SIZE, SIZE + 99):
        raw = Layer("raw", size, make=fill_raw(size))
        yield ImageSpec(f"over-raw-of-{size}", (raw, Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(2, 5),))))
    yield ImageSpec(
        "over-compressed",
        (
            Layer("qcow2", SIZE, make=compress_from_raw(6)),
            Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(2, 5),)),
        ),
    )
    yield ImageSpec(
        "over-zstd",
        (
            Layer("qcow2", SIZE, make=compress_from_raw(7, "compression_type=zstd,cluster_size=4k")),
            Layer("qcow2", SIZE, steps=(fill(2, 5),)),
        ),
    )
    yield ImageSpec(
        "over-snapshots",
        (
            Layer("qcow2", SIZE, steps=(fill(1), snapshot("one"), fill(2, 5))),
            Layer("qcow2", SIZE, steps=(fill(2, 5),)),
        ),
    )
    yield ImageSpec(
        "backing-in-subfolder",
        (Layer("raw", SIZE, name="base/disk.raw", make=fill_raw(8)), Layer("qcow2", SIZE, steps=(fill(1, 4),))),
    )
    yield ImageSpec(
        "image-in-subfolder",
        (
            Layer("qcow2", SIZE, name="a/base.qcow2", steps=(fill(1),)),
            Layer("qcow2", SIZE, name="b/c/middle.qcow2", steps=(fill(2, 4),)),
            Layer("qcow2", SIZE, name="b/top.qcow2", steps=(fill(3, 4),)),
        ),
        allows_folder=True,
    )
    yield ImageSpec(
        "absolute-backing",
        (
            Layer("qcow2", SIZE, name="a/base.qcow2", steps=(fill(1),)),
            Layer("qcow2", SIZE, name="b/top.qcow2", steps=(fill(3, 4),), absolute_backing=True),
        ),
        allows_folder=True,
    )
    yield ImageSpec(
        "backing-name-not-ascii",
        (Layer("raw", SIZE, name="grüße 1.raw", make=fill_raw(9)), Layer("qcow2", SIZE, steps=(fill(1, 4),))),
    )
    yield ImageSpec(
        "backing-format-not-named-raw",
        (Layer("raw", SIZE, make=fill_raw(10)), Layer("qcow2", SIZE, steps=(fill(1, 4), forget_backing_format))),
    )


def _snapshots() -> Iterable[ImageSpec]:
    for name, options in (
        ("v2", "compat=0.10"),
        ("v3", ""),
        ("v3-cluster-512", "cluster_size=512"),
        ("v3-refcount-2", "refcount_bits=2,cluster_size=4k"),
        ("v3-refcount-64", "refcount_bits=64,cluster_size=4k"),
        ("v3-preallocated", "preallocation=metadata"),
    ):
        yield _one(f"{name}-snapshot", SIZE, options, fill(1), snapshot("one"))
        yield _one(
            f"{name}-snapshots", SIZE, options, fill(1), snapshot("one"), fill(2, 4), snapshot("two"), fill(3, 4)
        )
    yield _one("v3-snapshot-deleted", SIZE, "", fill(1), snapshot("one"), fill(2, 4), delete_snapshot("one"))
    yield _one(
        "v3-snapshot-applied", SIZE, "cluster_size=4k", fill(1), snapshot("one"), fill(2), apply_snapshot("one")
    )


def _features() -> Iterable[ImageSpec]:
    yield _one("v3-unknown-compatible-bit", SIZE, "", fill(1), set_feature(80, 37))
    yield _one("v3-unknown-autoclear-bit", SIZE, "", fill(1), set_feature(88, 41))
    yield _one("v3-unknown-bits", SIZE, "cluster_size=4k", fill(1), set_feature(80, 63), set_feature(88, 63))
    zeroes = io("write -z 64k 192k", "write -z -u 512k 64k")
    yield _one("v3-amended-to-v2", SIZE, "", fill(1), zeroes, amend("compat=0.10"))
    yield _one("v3-amended-to-v2-and-back", SIZE, "", fill(1), zeroes, amend("compat=0.10"), amend("compat=1.1"))
    yield _one("v2-amended-to-v3", SIZE, "compat=0.10", fill(1), amend("compat=1.1"), zeroes, fill(2, 4))
    yield _one("v3-amended-lazy-on", SIZE, "", fill(1), amend("lazy_refcounts=on"), fill(2, 4))
    yield _one("v3-amended-lazy-off", SIZE, "lazy_refcounts=on", fill(1), amend("lazy_refcounts=off"), fill(2, 4))
    yield _one("v3-amended-refcount-64", SIZE, "cluster_size=4k", fill(1), amend("refcount_bits=64"), fill(2, 4))
    yield _one("v3-amended-refcount-1", SIZE, "cluster_size=4k", fill(1), amend("refcount_bits=1"), fill(2, 4))
    yield _one("v3-unknown-header-parts", SIZE, "", fill(1), unknown_header_parts)
    below = Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(1),))
    above = Layer("qcow2", SIZE, "cluster_size=4k", steps=(fill(2, 5), unknown_header_parts))
    yield ImageSpec("v3-unknown-header-parts-over-v3", (below, above))
    bitmaps = (fill(1), bitmap("first"), bitmap("second", "-g", "4k"), fill(2, 4))
    yield ImageSpec("v3-bitmaps", (Layer("qcow2", SIZE, steps=bitmaps),))
    yield ImageSpec("v3-bitmaps-cluster-512", (Layer("qcow2", SIZE, "cluster_size=512", steps=bitmaps),))


def _large() -> Iterable[ImageSpec]:
    for name, size, options in (
        ("v3-64T-cluster-2M", 64 * TIB, "cluster_size=2M"),
        ("v3-1T-cluster-64k", TIB, ""),
        ("v3-64T-cluster-64k", 64 * TIB, ""),
        ("v3-1E-cluster-2M", 1024 * 1024 * TIB, "cluster_size=2M"),
        ("v3-1E-extended-cluster-2M", 1024 * 1024 * TIB, "cluster_size=2M,extended_l2=on"),
        ("v3-16G-cluster-512", 16 * 1024 * MIB, "cluster_size=512"),
        ("v2-1T-cluster-64k", TIB, "compat=0.10"),
        ("v1-4G", 4096 * MIB, ""),
    ):
        places = (0, size // 3 // MIB * MIB, size // 2, size - MIB)
        commands = [f"write -P {number + 1} {place + 4096} 200k" for number, place in enumerate(places)]
        commands.append(f"write -P 77 {size - 512} 512")
        yield ImageSpec(
            name,
            (Layer("qcow" if name.startswith("v1") else "qcow2", size, options, steps=(io(*commands),)),),
            windows=places,
        )


def all_specs() -> tuple[ImageSpec, ...]:
    """Every image of the matrix, in a fixed order; ids are unique."""
    parts = (
        _plain,
        _sizes,
        _zeroes,
        _compressed,
        _extended,
        _data_files,
        _version1,
        _chains,
        _snapshots,
        _features,
        _large,
    )
    specs = tuple(spec for part in parts for spec in part())
    assert len({spec.id for spec in specs}) == len(specs)
    return specs
