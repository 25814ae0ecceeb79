"""The triton backend: what the shared tests of the op leave open, and what can be checked without a GPU.

Where there is no GPU, triton's interpreter runs the kernels on the CPU in a process of its own. For every GPU that
triton knows, the kernels are compiled, if not run.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_quantize_statement import assert_within, gradients, nearest
from numpy.lib import NumpyVersion
from torch import Tensor

from qlae_kernels import available_backends, latent_quantize, latent_quantize_triton
from qlae_kernels.gpu_tensors import COUNTERS_PER_LAUNCH
from qlae_kernels.latent_quantize import make_call
from qlae_kernels.latent_quantize_triton import Plan, plan
from qlae_kernels.problem import Problem, compute_dtype_of

ROOT = Path(__file__).resolve().parents[2]
INTERPRETED = "cpu" in latent_quantize_triton.DEVICE_TYPES
runs = pytest.mark.skipif("triton" not in available_backends(), reason="no GPU, and triton's interpreter is off")
compiles = pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs triton's compiler")
WEIGHTS = {"quantization_weight": 0.75, "commitment_weight": 0.25}

# What takes the interpreter long: very many latents or codes, all half values, many steps, and the same once more.
TOO_LONG = (
    "every_half_value",
    "codes_round_to_nearest_even",
    "index_dtype_that_just_fits",
    "codebook_of_every_size",
    "distances_is_allocated",
    "surrogate and unit",
    "argmin and 300",
    "argmin and many and (float16 or float64)",
    "index_dtypes and (600 or int16 or int32 or int64)",
    "surrogate and float16 and (cells or period)",
    "not_finite_shows and 100",
    "importing",
    "be_changed_before_backward and 40000",
    "indices_values_loss and (latents or levels and not (few and order))",
    "many_codes_of_any_spacing",
    "opcheck and (contiguous or permuted or strided or expanded)",
    "opcheck and not (float32 or two or other)",
    "gradgradcheck_of_the_op",
    "under_autocast",
    "vmap_equals and (float32 or not both)",
    "compiled_transform and not vmap",
    "move_to_the_centres",
    "trains_an_encoder",
)
# The files of which one process of the interpreter runs the tests, and a number that the tests exceed.
GROUPS = {
    "the op": (("latent_quantize", "latent_quantize_triton"), 250),
    "in PyTorch": (
        (
            *(f"latent_quantize_{name}" for name in ("ops", "half", "transforms", "export", "scale")),
            *("mask", "quantizer", "codes_from_data", "readme"),
        ),
        100,
    ),
}


@pytest.mark.skipif(INTERPRETED or find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(("files", "fewest"), GROUPS.values(), ids=GROUPS)
def test_the_tests_of_the_op_pass_in_the_interpreter(files: tuple[str, ...], fewest: int) -> None:
    import triton

    # Its loops make numbers of arrays of one element.
    if NumpyVersion(triton.__version__) < "3.7.0" and NumpyVersion(np.__version__) >= "2.4.0":
        pytest.skip(
            f"needs triton 3.7 or NumPy before 2.4; here are triton {triton.__version__}, NumPy {np.__version__}"
        )
    selection = "triton and " + " and ".join(f"not ({words})" for words in TOO_LONG)
    run = subprocess.run(
        [
            *(sys.executable, "-P", "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore"),
            *("-k", selection, *(str(Path(__file__).with_name(f"test_{name}.py")) for name in files)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed
    assert int(passed[1]) > fewest


def random_call(shape: tuple[int, ...], dtype: torch.dtype, rows: int, codes: int) -> tuple[Tensor, Tensor, Tensor]:
    """z, a codebook, and a gradient of `quantized`."""
    generator = torch.Generator().manual_seed(sum(shape))
    z, grad_quantized = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
    codebook = torch.randn(rows, codes, generator=generator, dtype=torch.float64)
    return z, codebook.to(compute_dtype_of(dtype)), grad_quantized


@runs
@pytest.mark.parametrize(
    ("shape", "rows", "dtype", "codes"),
    [
        ((300, 12), 12, torch.float32, 5),
        ((300, 12), 12, torch.float64, 3),
        ((150, 12), 12, torch.bfloat16, 20),
        ((70, 50), 50, torch.float32, 5),
        ((2001, 1), 1, torch.float32, 5),
        ((3, 2, 701), 2, torch.float16, 5),
        ((3, 2, 351), 2, torch.float32, 20),
        ((30, 70), 70, torch.float32, 20),
        ((2001, 1), 1, torch.float64, 40),
        ((5, 700), 700, torch.float32, 5),
        ((90, 17), 1, torch.float32, 5),
    ],
    ids=str,
)
def test_many_programs_and_groups_of_them(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], rows: int, dtype: torch.dtype, codes: int
) -> None:
    # Small tiles, so that small inputs have many.
    for name, value in (("PIECE", 128), ("PIECES", 2), ("LANES", 64), ("MOST_ELEMENTS_OF_ONE_PROGRAM", 256)):
        monkeypatch.setattr(latent_quantize_triton, name, value)
    monkeypatch.setattr(latent_quantize_triton, "_processors", lambda device: 5)
    z, codebook, grad_quantized = random_call(shape, dtype, rows, codes)
    call = call_of(z, codebook, codes)
    cut = plan(call.problem, 5, summing_codes=True)
    assert cut.programs > 1
    expected = gradients(z, codebook, grad_quantized, 3.0, **WEIGHTS)
    device = "cpu" if INTERPRETED else "cuda"
    z, codebook, grad_quantized = (tensor.to(device) for tensor in (z, codebook, grad_quantized))
    grad_loss = torch.full((), 3.0, dtype=codebook.dtype, device=device)
    results = []
    for _ in range(2):
        _, indices, loss = call.forward(z, codebook)
        results.append((indices, loss, *call.backward(z, codebook, grad_quantized, grad_loss, True, True)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    indices, loss, grad_z, grad_codebook = (tensor.cpu() for tensor in results[0])
    assert torch.equal(indices, nearest(z.cpu(), codebook.cpu()).to(torch.int32))
    assert_within(loss, expected.loss, expected.loss_bound)
    assert_within(grad_z, expected.grad_z, expected.grad_z_bound)
    assert_within(grad_codebook, expected.grad_codebook, expected.grad_codebook_bound)


def call_of(z: Tensor, codebook: Tensor, codes: int):
    """A call that nothing keeps, for z on the device that triton serves here."""
    device = torch.device("cpu") if INTERPRETED else torch.device("cuda", torch.cuda.current_device())
    tensors = (z.shape, z.dtype, device, codebook.shape, codebook.dtype, device)
    return make_call(*tensors, (None, 1, *WEIGHTS.values(), torch.int32, True, "triton"))


@runs
@pytest.mark.parametrize("need_codebook", [False, True])
@pytest.mark.parametrize("need_z", [False, True])
def test_wide_offsets_change_nothing(monkeypatch: pytest.MonkeyPatch, need_z: bool, need_codebook: bool) -> None:
    def wide(*arguments: object, **options: object) -> Plan:
        cut = plan(*arguments, **options)
        return type(cut)(**{name: getattr(cut, name) for name in cut.__slots__} | {"wide": True})

    for shape in ((300, 12), (3, 4, 300)):
        z, codebook, _ = random_call(shape, torch.float32, shape[1], 7)
        want = None
        for replacement in (plan, wide):
            monkeypatch.setattr(latent_quantize_triton, "plan", replacement)
            call = call_of(z, codebook, 7)
            z, codebook = (tensor.to(call.problem.device) for tensor in (z, codebook))
            outputs = call.forward(z, codebook)
            outputs += call.backward(z, codebook, None, outputs[2], need_z, need_codebook)
            want = want or outputs
            for got, expected in zip(outputs, want, strict=True):
                assert (got is None and expected is None) or torch.equal(got, expected)


def problem_of(outer: int, num_latents: int, inner: int, codes: int, dtype: torch.dtype, shared: bool) -> Problem:
    return Problem(
        outer,
        num_latents,
        inner,
        size=outer * num_latents * inner,
        channel_dim=1,
        rows=1 if shared else num_latents,
        stride=codes,
        levels=None,
        **WEIGHTS,
        value_dtype=dtype,
        index_dtype=torch.int32,
        return_indices=True,
        device=torch.device("cuda", 0),
    )


OUTERS = (1, 7, 128, 5000, 1 << 20, (1 << 33) + 5)
LATENTS = (1, 2, 3, 12, 16, 17, 63, 64, 65, 100, 130, 639, 640, 1000, 4096, 70_001)
INNERS = (1, 2, 49, 4096, 1 << 22)


@pytest.mark.parametrize("codes", [1, 10, 16, 17, 512, 8192])
@pytest.mark.parametrize("summing_codes", [False, True])
def test_plans_cover_the_problem_and_keep_their_limits(codes: int, summing_codes: bool) -> None:
    dtypes = (torch.float32, torch.float64)
    for outer, num_latents, inner, dtype, shared in product(OUTERS, LATENTS, INNERS, dtypes, (False, True)):
        problem = problem_of(outer, num_latents, inner, codes, dtype, shared)
        if problem.size > 1 << 36:
            continue
        cut = plan(problem, 132, summing_codes)
        samples = outer * inner if cut.runs else -(-problem.size // cut.spacing)
        assert cut.tiles * cut.rows >= samples > (cut.tiles - 1) * cut.rows
        assert cut.windows * cut.block >= (cut.num_latents if cut.runs else cut.spacing)
        assert 1 <= cut.parts <= cut.tiles
        assert cut.spacing % cut.align == problem.size % cut.align == 0
        if not cut.runs:
            assert cut.spacing % cut.num_latents == 0
        groups = -(-cut.parts // cut.group_size)
        if not cut.direct:
            assert cut.windows * (groups + 1) <= COUNTERS_PER_LAUNCH
        assert cut.wide or largest_offset(cut) < 1 << 31
        if summing_codes and not cut.few:
            sums = 8 * codes * (cut.programs * cut.lanes + cut.parts * cut.windows * cut.columns)
            size, compute_size = problem.size, problem.compute_dtype.itemsize
            # The last: two numbers for each code, of latents up to whole windows.
            assert sums <= max(24 << 20, size * compute_size // 4, 2 * 8 * codes * cut.windows * cut.block)
        assert cut.wide or problem.rows * codes < 1 << 31


def largest_offset(cut: Plan) -> int:
    """Of the last element of the last tile, exist it or not, as `_places` has it."""
    row = cut.tiles * cut.rows - 1
    if not cut.runs:
        return row * cut.spacing + cut.windows * cut.block - 1
    return (row // cut.spacing * cut.num_latents + cut.windows - 1) * cut.spacing + row % cut.spacing


def test_the_papers_batch_is_one_program() -> None:
    problem = problem_of(128, 12, 1, 10, torch.float32, False)
    for summing_codes in (False, True):
        cut = plan(problem, 132, summing_codes)
        assert cut.programs == 1
        assert cut.direct


KINDS = {
    "the paper's latents": problem_of(1 << 20, 12, 1, 10, torch.float32, False),
    "the paper's batch": problem_of(128, 12, 1, 10, torch.float32, False),
    "16 codes": problem_of(1 << 20, 16, 1, 16, torch.bfloat16, False),
    "float64": problem_of(1 << 20, 12, 1, 12, torch.float64, False),
    "many codes": problem_of(1 << 20, 16, 1, 512, torch.float32, False),
    "many codes of one latent": problem_of(4096, 1, 1, 4096, torch.bfloat16, False),
    "many codes, images": problem_of(64, 32, 4096, 64, torch.float32, False),
    "more than 2**31 latents": problem_of(134_217_736, 16, 1, 10, torch.bfloat16, False),
    "images": problem_of(64, 32, 4096, 10, torch.float16, False),
    "more than 2**31 images": problem_of(1 << 18, 32, 4096, 256, torch.float32, False),
}
TARGETS = (("cuda", 80, 32), ("cuda", 90, 32), ("cuda", 100, 32), ("hip", "gfx942", 64))
# One kind for each of NVIDIA's architectures, all kinds for one.
COMPILED = [
    (name, target)
    for name, target in product(KINDS, TARGETS)
    if target[1] not in (80, 100) or "latents" in name or "many codes" in name
]
TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16", torch.bfloat16: "bf16"}


def compiled(problem: Problem, backward: bool, target: tuple[str, int | str, int]):
    """The kernel that serves the problem, compiled for a GPU that need not be there."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qlae_kernels import latent_quantize_triton_kernels as kernels

    cut = plan(problem, 132, summing_codes=backward)
    kernel = kernels.backward_kernel if backward else kernels.forward_kernel
    value, compute = TYPES[problem.value_dtype], TYPES[problem.compute_dtype]
    constants = cut.constants(ragged=False)
    absent = ["levels_ptr"]
    absent += ["sorted_ptr", "order_ptr", "first_nan_ptr"] if cut.few else []
    if backward:
        constants |= {"GRAD_QUANTIZED": True, "GRAD_Z": True, "GRAD_CODEBOOK": True}
        constants |= {"COLUMNS": cut.columns, "LANES": cut.lanes}
        constants |= {"DIRECT": cut.direct, "FOLDED": cut.folded}
        absent += ["sums_ptr", "counters_ptr"] if cut.direct else []
        absent += ["partials_ptr"] if cut.direct and cut.few else []
        absent += ["lanes_ptr"] if cut.few else []
    else:
        constants |= {"INDICES": True, "SINGLE": cut.programs == 1}
        absent += ["partials_ptr", "counters_ptr"] if cut.programs == 1 else []
    pointers = dict.fromkeys(("indices_ptr", "counters_ptr", "order_ptr", "first_nan_ptr"), "i32")
    pointers |= dict.fromkeys(("codebook_ptr", "sorted_ptr", "loss_ptr", "grad_loss_ptr", "grad_codebook_ptr"), compute)
    pointers |= {"sums_ptr": "fp64", "lanes_ptr": "fp64", "partials_ptr": compute if backward and cut.few else "fp64"}
    # As triton infers it from the number.
    large = cut.size // cut.align >= 2**31
    signature = {name: "i64" if name == "size_units" and large else "i32" for name in kernels.SIZES}
    signature |= {name: "*" + pointers.get(name, value) for name in kernel.arg_names if name.endswith("_ptr")}
    signature |= dict.fromkeys(kernels.HALVES, "i32")
    signature |= dict.fromkeys((*constants, *absent), "constexpr")
    signature = {name: signature[name] for name in kernel.arg_names}
    aligned = [["tt.divisibility", 16]]
    attributes = {(place,): aligned for place, kind in enumerate(signature.values()) if kind.startswith("*")}
    source = ASTSource(kernel, signature, constants | dict.fromkeys(absent), attributes)
    options = {"num_warps": latent_quantize_triton.NUM_WARPS, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget(*target), options=options)


def ptxas_report(ptx: str, architecture: int) -> str:
    """What NVIDIA's assembler, which triton brings along, says about registers and spills."""
    import triton

    name = "ptxas-blackwell" if architecture >= 100 else "ptxas"
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    suffix = "a" if architecture >= 90 else ""
    command = [assembler, "-v", f"--gpu-name=sm_{architecture}{suffix}", "/dev/stdin", "-o", "/dev/null"]
    return subprocess.run(command, input=ptx, capture_output=True, text=True, check=True).stderr


@compiles
@pytest.mark.parametrize("target", TARGETS, ids=lambda value: str(value[1]))
@pytest.mark.parametrize("compute", ["fp32", "fp64"])
def test_sorting_compiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compute: str, target: tuple[str, int | str, int]
) -> None:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from qlae_kernels.latent_quantize_triton_kernels import sort_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature = dict.fromkeys(("codebook_ptr", "sorted_ptr"), "*" + compute)
    signature |= dict.fromkeys(("levels_ptr", "order_ptr", "first_nan_ptr"), "*i32")
    signature |= dict.fromkeys(("num_latents", "num_codes", "passes"), "i32")
    constants = {"RAGGED": True, "LANES": latent_quantize_triton.SORTED_AT_A_TIME}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in sort_kernel.arg_names}
    kernel = triton.compile(ASTSource(sort_kernel, signature, constants), target=GPUTarget(*target))
    if target[0] == "hip":
        assert int(re.search(r"\.vgpr_spill_count: *(\d+)", kernel.asm["amdgcn"])[1]) == 0
    else:
        assert "0 bytes spill stores" in ptxas_report(kernel.asm["ptx"], int(target[1]))


@compiles
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize(("name", "target"), COMPILED, ids=lambda value: str(value[1]) if len(value) == 3 else value)
def test_kernels_compile_and_keep_to_their_registers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, target: tuple[str, int | str, int], backward: bool
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan_of_kind = plan(KINDS[name], 132, summing_codes=backward)
    kernel = compiled(KINDS[name], backward, target)
    if target[0] == "hip":
        counts = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count): *(\d+)", kernel.asm["amdgcn"]))
        assert int(counts["vgpr_spill_count"]) == 0
        assert 0 < int(counts["vgpr_count"]) <= 256
        return
    # Subnormal values count.
    assert ".ftz" not in kernel.asm["ptx"]
    assert "fma.rn.f" not in kernel.asm["ptx"]
    # Sizes are widened before they are multiplied.
    assert re.search(r"muli %size_units.* : i32", kernel.asm["ttir"]) is None or not plan_of_kind.wide
    report = ptxas_report(kernel.asm["ptx"], int(target[1]))
    # The assembler may put a few registers by to run one more block beside the others.
    assert int(re.search(r"(\d+) bytes spill stores", report)[1]) <= 64, report
    assert 0 < int(re.search(r"Used (\d+) registers", report)[1]) <= 255


def test_reasons_name_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latent_quantize_triton, "_INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(latent_quantize_triton, "find_spec", lambda name: object())
    assert latent_quantize_triton.unavailable_reason() is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert re.search(r"no GPU.*backend='reference' or 'auto'", latent_quantize_triton.unavailable_reason())
    monkeypatch.setattr(latent_quantize_triton, "find_spec", lambda name: None)
    reason = latent_quantize_triton.unavailable_reason()
    assert re.search(r"not installed.*pip install triton.*backend='reference' or 'auto'", reason)


def test_importing_the_package_imports_no_triton() -> None:
    lines = "import sys, qlae_kernels\nprint('triton' in sys.modules)"
    before = "import sys, torch\nprint('triton' in sys.modules)"
    runs = [
        subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
        for code in (before, lines)
    ]
    assert runs[0] == runs[1]


@runs
def test_tensors_elsewhere_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"'triton'.*meta.*'auto'"):
        latent_quantize(torch.zeros(4, 3, device="meta"), torch.zeros(3, 5, device="meta"), backend="triton")
