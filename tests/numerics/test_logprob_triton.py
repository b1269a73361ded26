"""The Triton pass on CPU tensors under Triton's interpreter, and the kernels cross-compiled for sm_90.

The interpreter must be chosen before triton is imported, so the tests marked `interpreted` run in a child process that
`test_under_the_interpreter` starts. bf16 products there are upcast library products: no `tl.dot` is involved.
"""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import logprob_cases as cases
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
interpreted = pytest.mark.skipif(not INTERPRETING, reason="runs in the child process of test_under_the_interpreter")
compiled = pytest.mark.skipif(INTERPRETING, reason="needs the compiler, not the interpreter")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRANSFORMS = [{}, {"softcap": 3.0, "logit_scale": 0.7}, {"logit_scale": 2.0}]


@compiled
def test_under_the_interpreter():
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "ignore::RuntimeWarning", __file__]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", done.stdout).group(1))
    assert passed >= 40, done.stdout[-2000:]


@pytest.fixture
def small_tiles(monkeypatch):
    """Chunks, slabs and blocks that divide neither N nor V of the default problem."""
    monkeypatch.setattr("silkie.logprob.triton_pass.ROWS", 5)
    monkeypatch.setattr("silkie.logprob.triton_pass.COLUMNS", 24)
    monkeypatch.setattr("silkie.logprob.triton_pass._BLOCK", 16)


@interpreted
@pytest.mark.parametrize("train_head", [False, True])
@pytest.mark.parametrize("options", TRANSFORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_gradients_and_statistics(small_tiles, dtype, options, train_head):
    hidden, weight, target, offset = cases.problem(n=7, dtype=dtype, bias=bool(options))
    target[3] = -100
    cases.check(hidden, weight, target, offset, impl="triton", train_head=train_head, **options)


@interpreted
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("train_head", [False, True])
def test_extreme_logprobs(small_tiles, dtype, train_head):
    cases.check(*cases.extreme_rows(dtype), impl="triton", train_head=train_head)


@interpreted
def test_confident_rows_keep_their_gradient(small_tiles):
    cases.check_confident("triton")


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_ratio_near_the_reference(small_tiles, dtype):
    # bf16 operands too: logits are held in fp32, so the same bound holds.
    error, naive = cases.log_ratio_error("triton", dtype)
    assert error <= 1e-5, (error, naive)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_huge_logits(small_tiles, dtype):
    hidden, weight, target, _ = cases.problem(bias=False)
    scale = 1e4 / (hidden @ weight.t()).abs().max()
    cases.check((hidden * scale).to(dtype), weight.to(dtype), target, None, impl="triton", train_head=True)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", cases.CASES)
def test_case(small_tiles, case, dtype):
    case("triton", dtype)


@interpreted
@pytest.mark.parametrize(("n", "v"), [(0, 7), (1, 1), (1, 7), (4, 23), (5, 24), (6, 25), (1, 257)])
def test_ragged_sizes(small_tiles, n, v):
    hidden, weight, target, bias = cases.problem(n, 11, v, torch.float32)
    cases.check(hidden, weight, target, bias, impl="triton", train_head=True, stats=n > 0)


@interpreted
def test_targets_at_slab_edges(small_tiles):
    hidden, weight, _, bias = cases.problem(8, 24, 57, torch.float32)
    cases.check(hidden, weight, torch.tensor([0, 15, 16, 23, 24, 47, 48, 56]), bias, impl="triton", train_head=True)


POINTERS = {"target_ptr": "*i64", "ignored_ptr": "*i8"}
OPERANDS = {"hidden_ptr", "weight_ptr", "bias_ptr", "exps_ptr", "out_ptr"}


def cross_compile(kernel, constants: dict, operand: str, fp32_out: bool = False):
    """Compiles for an H100 without one. Signature: operands in `operand`, strides and offsets i32, other pointers and
    scalars fp32.

    Pointers, strides and offsets are multiples of 16, as the launcher finds them at D = 3584 and V = 151,936.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in inspect.signature(kernel.fn).parameters:
        if name in constants:
            signature[name] = "constexpr"
        elif name in POINTERS:
            signature[name] = POINTERS[name]
        elif name in OPERANDS and not (fp32_out and name == "out_ptr"):
            signature[name] = f"*{operand}"
        elif name.endswith("_ptr"):
            signature[name] = "*fp32"
        else:
            signature[name] = "i32" if name.endswith("stride") or name == "first_column" else "fp32"
    aligned = [i for i, kind in enumerate(signature.values()) if kind.startswith("*") or kind == "i32"]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def resources(binary, folder: Path) -> dict[str, int]:
    """Registers, stack and local bytes of the compiled kernel, read by the cuobjdump that comes with triton."""
    import triton

    path = folder / "kernel.cubin"
    path.write_bytes(binary.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}


FLAGS = {"HAS_BIAS": True, "HAS_SOFTCAP": True}
SLAB = {"COLS": 12288, "D": 3584, "BLOCK": 2048}
PLAIN = {"HAS_BIAS": False, "HAS_SOFTCAP": False}
# Every kernel with all it can do, and the slab kernel as the passes of a run launch it: policy, with statistics,
# reference.
KERNELS = {
    "target_logit_kernel": ({**FLAGS, "D": 3584, "BLOCK": 2048}, True),
    "slab_kernel": ({**FLAGS, **SLAB, "WANT_GRAD": True, "WANT_STATS": True}, False),
    "slab_kernel/policy": ({**PLAIN, **SLAB, "WANT_GRAD": True, "WANT_STATS": False}, False),
    "slab_kernel/policy with statistics": ({**PLAIN, **SLAB, "WANT_GRAD": True, "WANT_STATS": True}, False),
    "slab_kernel/reference": ({**PLAIN, **SLAB, "WANT_GRAD": False, "WANT_STATS": False}, False),
    "gradient_kernel": ({"HAS_SOFTCAP": True, "D": 3584, "BLOCK": 2048}, False),
    "coefficient_kernel": ({**FLAGS, "COLS": 12288, "BLOCK": 2048}, False),
}


@compiled
@pytest.mark.parametrize("operand", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_for_sm_90_without_spills(name, operand, tmp_path):
    from silkie.logprob import triton_kernels

    constants, fp32_out = KERNELS[name]
    binary = cross_compile(getattr(triton_kernels, name.partition("/")[0]), constants, operand, fp32_out)
    used = resources(binary, tmp_path)
    assert used["STACK"] == 0 and used["LOCAL"] == 0, used
    assert 0 < used["REG"] <= 255, used
    assert binary.metadata.shared <= 227 * 1024
    # Every element is read and written in wide vectors: the kernel is bound by memory.
    assert re.search(r"ld\.global.*\.v4\.b32|ld\.global.*\.v2\.b64", binary.asm["ptx"]), "no 16-byte loads"
