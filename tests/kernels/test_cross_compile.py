"""The checks on machine code. What compiles does so in a process of its own: this one interprets kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from interpreter import install

from quire.kernels.compile_cases import all_cases, table_cases
from quire.kernels.cross_compile import COUNTED, Needs, Resources
from quire.kernels.launch import Shape

COMPILE = """
import json, sys, warnings
warnings.simplefilter("ignore")
from quire.kernels.compile_cases import Attention
from quire.kernels.cross_compile import compiled
cases = [(Attention("paged_decode", 64), 90), (Attention("paged_prefill", 64), 90), (Attention("paged_decode", 64, slot_gap=1), 90)]
rows = [(one.kernel, one.arch, one.registers, wrong) for of, arch in cases for one, wrong in compiled(of.case(), arch)]
json.dump(rows, sys.stdout)
"""

FIXED = """
import json, sys, warnings
warnings.simplefilter("ignore")
from dataclasses import asdict
import torch
from quire.kernels.compile_cases import Attention
from quire.kernels.cross_compile import compiling
from quire.kernels.triton_ops import fixed_attention
params = tuple(asdict(fixed_attention(4)).items())
for dtype, soft_cap in ((torch.bfloat16, None), (torch.bfloat16, 30.0), (torch.float32, None)):
    with compiling(90) as found:
        Attention("paged_prefill", 64, dtype, dtype, soft_cap=soft_cap, params=params).launch()
    print(json.dumps(found[0][1].asm["ptx"]))
"""


def resources(**counts: int) -> Resources:
    return Resources("_decode_kernel", 90, 128, counts.pop("stack", 0), counts.pop("shared", 0), counts.pop("wide", 0),
                     dict.fromkeys(COUNTED, 0) | counts)  # fmt: skip


def test_complaints() -> None:
    assert resources().complaints(Needs.NOTHING) == []
    assert resources(LDL=2, STL=1, stack=16).complaints(Needs.NOTHING) == ["3 spills, 16 bytes of stack"]
    assert resources(shared=227 * 1024).complaints(Needs.NOTHING) == []
    assert "shared memory" in resources(shared=227 * 1024 + 1).complaints(Needs.NOTHING)[0]
    assert resources(HMMA=1, wide=1).complaints(Needs.ASYNC_COPIES | Needs.TENSOR_CORES) == []
    assert len(resources(LDGSTS=9).complaints(Needs.ASYNC_COPIES | Needs.TENSOR_CORES)) == 2  # copies, but narrow ones
    assert resources(HMMA=1).complaints(Needs.WARP_GROUP) == ["no tensor cores of a warp group"]
    assert resources(HGMMA=1).complaints(Needs.WARP_GROUP | Needs.TENSOR_CORES) == []


def test_case_names_are_unique() -> None:
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)


def test_a_table_entry_becomes_a_case_on_its_chip() -> None:
    shape = Shape("paged_decode", "bfloat16+float8_e4m3fn", 128, 8, 32, 64)
    params = {"block_n": 64, "num_warps": 4, "num_stages": 3, "min_split_keys": 256, "max_splits": 16}
    (case,) = table_cases({(90, shape): params})
    assert case.arches == (90,)
    assert case.name == "paged_decode bfloat16+float8_e4m3fn d128 g8 p32 table b64"
    assert Needs.ASYNC_COPIES in case.needs["_decode_kernel"]


@pytest.mark.parametrize(("shape", "params"), [
    (Shape("rms_norm", "bfloat16", 64, bucket=2), {"elements": 64, "num_warps": 1}),
    (Shape("silu_mul", "bfloat16", 64, bucket=2), {"elements": 32, "num_warps": 1}),
    (Shape("rope_write", "bfloat16+float8_e4m3fn", 32, 3, 16, 16), {"heads": 4, "num_warps": 1}),
    (Shape("page_copy", "int32"), {"programs": 2, "words": 4096, "num_warps": 1}),
    (Shape("sampling", "float32", bucket=1), {"elements": 65536, "num_warps": 1}),
])  # fmt: skip
def test_an_entry_of_every_kernel_is_launched(shape: Shape, params: dict[str, int]) -> None:
    (case,) = table_cases({(80, shape): params})
    install()
    case.launch()  # interpreted here; as many parameters, and these, as the launcher takes


def test_an_entry_that_no_launcher_looks_for_is_refused() -> None:
    (case,) = table_cases({(80, Shape("attention", "bfloat16")): {}})
    with pytest.raises(ValueError, match="attention"):
        case.launch()


def test_needs_a_compiler_not_an_interpreter(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quire.kernels.cross_compile"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr


@pytest.mark.slow
def test_machine_code_and_what_a_misaligned_stride_does_to_it(root: Path, tmp_path: Path) -> None:
    """The launchers' own specialization is what is compiled: keys one element further apart, and wide copies are gone."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=800,
        check=True,
    )
    rows = [row for row in json.loads(done.stdout) if row[0] != "_combine_kernel"]
    aligned, misaligned = rows[:-1], rows[-1]
    assert [row[:2] for row in aligned] == [["_decode_kernel", 90], ["_prefill_kernel", 90]]
    assert all(wrong == [] for *_, wrong in aligned)
    assert "no asynchronous 16-byte copies" in misaligned[3]


@pytest.mark.slow
def test_exponents_are_made_by_the_same_instructions_with_masks_and_without(root: Path, tmp_path: Path) -> None:
    """One walk rounds a product before it subtracts, and the other does not, if the compiler has its way: then a token's bits depend on the
    tile that it is in."""
    done = subprocess.run(
        [sys.executable, "-c", FIXED],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)},
        cwd=root,
        capture_output=True,
        text=True,
        timeout=800,
        check=True,
    )
    for ptx in map(json.loads, done.stdout.splitlines()):
        makes: dict[str, str] = {}
        exponents = []
        for name, result, first in re.findall(r"^\s*([\w.]+)\s+(%\w+), (%\w+)", ptx, re.MULTILINE):
            if name.startswith("ex2."):
                exponents.append(makes[first])
            makes[result] = name
        half = len(exponents) // 2
        assert exponents[:half] == exponents[half:]
        assert "fma.rn.f32" in exponents
