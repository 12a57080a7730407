"""qcowfuse-img against qemu-img over the image matrix: info field by field, map entry by entry, check by its sums."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qcowfuse.cli.img.main import main
from tests.support import qemu
from tests.support.matrix import TIB, ImageSpec, all_specs, build

SPECS = all_specs()


def run_json(capsys: pytest.CaptureFixture[str], *words: str | Path) -> Any:
    """The JSON that a sub-command prints; it must succeed or have a verdict."""
    main([*map(str, words), "--output=json"])
    captured = capsys.readouterr()
    assert captured.out, captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.id)
def test_says_what_qemu_img_says(spec: ImageSpec, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """info, map and check of an image by QEMU give qemu-img's answers, field by field, and its exit code."""
    built = build(spec, image_folder)
    assert run_json(capsys, "info", built.path) == qemu.info(built.path, spec.format_name)
    if spec.layers[-1].size <= 64 * TIB:  # for larger ones qemu-img takes minutes
        assert run_json(capsys, "map", *built.words, built.path) == qemu.map_extents(built.path, spec.format_name)
    judged = qemu.run("qemu-img", "check", "-f", spec.format_name, "--output=json", built.path)
    code = main(["check", "--output=json", str(built.path)])
    assert code == judged.code
    said = capsys.readouterr().out
    assert (json.loads(said) if said else None) == (json.loads(judged.stdout) if judged.stdout else None)
