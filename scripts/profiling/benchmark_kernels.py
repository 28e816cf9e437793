"""Time every kernel of the inference path against the compiled plain form, at the sizes of Wan 1.3B; a GPU, a minute.

    python scripts/profiling/benchmark_kernels.py --json kernels.json
    python scripts/profiling/benchmark_kernels.py --json kernels.json --sweep  # other launch shapes too

Errors are relative to float64, beside those of the plain form in bfloat16. Attention and writes are timed by backend.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

from arl2.hybrid_attention import HybridAttention
from arl2.inference.fused_ops import DeferredResidual, FusedOps, StateRead, require_kernels
from arl2.inference.linear import RowScaledFP8
from arl2.inference.model import new_fused_ops
from arl2.ops.gated_delta import WriteBackend, gated_delta_write
from pipelines.cli import choose_device, entry_point
from pipelines.flags import Parser, as_path
from pipelines.provenance import device_name
from wan.config import wan_size
from wan.model import Block
from wan.ops.attention import AttentionBackend, attention
from wan.ops.rope import rotary_angles
from wan.utils.files import check_target, write_json

Function = Callable[..., Any]
HALF = torch.bfloat16
FRAMES, HEIGHT, WIDTH = 3, 30, 52
"""Of a block, in patches."""
NORM_SHAPES = ((1, 4), (2, 2), (4, 4), (4, 8), (8, 8))
"""RowScaledFP8 and warps of `norm`, for --sweep."""
STATE_SHAPES = ((128, 8, None), (64, 4, 168), (64, 4, 128), (64, 8, 128), (256, 8, None))
"""RowScaledFP8, warps and registers of `read_state` and `state_keys`."""


def exact(x: Any) -> Any:
    """The same in float64."""
    if isinstance(x, Tensor):
        return x.double() if x.is_floating_point() else x
    if isinstance(x, list | tuple):
        parts = [exact(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else type(x)(parts)
    return deepcopy(x).double() if isinstance(x, nn.Module) else x


def tensors(x: Any) -> list[Tensor]:
    """Copies of all tensors in some outputs, e4m3 rows as the values they stand for."""
    if isinstance(x, RowScaledFP8):
        return [x.values.double() * x.scales]
    if isinstance(x, Tensor):
        return [x.double()]
    return [tensor for part in x or () for tensor in tensors(part)]


def error(found: list[Tensor], truth: list[Tensor]) -> float:
    """The greatest relative error of some outputs."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True))


def microseconds(function: Function, recorded: bool = True) -> float:
    """Median of a call on the GPU alone, recorded as a CUDA graph as in inference; else with its launches."""
    from triton.testing import do_bench, do_bench_cudagraph

    if recorded:
        return 1e3 * float(do_bench_cudagraph(function, rep=30, return_mode="median"))
    return 1e3 * float(do_bench(function, warmup=10, rep=60, return_mode="median"))


class Bench:
    """RowScaledFP8 of the table, printed as they come.

    Args:
        device: of the inputs.
    """

    def __init__(self, device: torch.device) -> None:
        sizes = wan_size("1.3B")
        self.device, self.dim, self.heads, self.ffn = device, sizes["dim"], sizes["num_heads"], sizes["ffn_dim"]
        self.tokens, self.text_len = FRAMES * HEIGHT * WIDTH, sizes["text_len"]
        self.rows: list[dict[str, Any]] = []
        self._console = Console(highlight=False, soft_wrap=True)

    def random(self, *shape: int) -> Tensor:
        """Random values in half precision."""
        return torch.randn(shape, device=self.device, dtype=HALF)

    def drawn(self, module: nn.Module) -> Any:
        """A module no parameter of which is at a special value."""
        for parameter in module.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
        return module.to(self.device, HALF).requires_grad_(False)

    def note(self, **row: Any) -> None:
        """Keep and print a row."""
        self.rows.append(row)
        self._console.print(*(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))

    def compare(
        self, name: str, kernel: Function, plain: Function, *inputs: Any, truth: Function | None = None
    ) -> None:
        """Time and check a kernel; `truth` where the plain function itself rounds to e4m3."""
        torch.compiler.reset()
        fast = torch.compile(plain, dynamic=False, fullgraph=True)
        expected = tensors((truth or plain)(*exact(inputs)))
        self.note(
            name=name,
            us=microseconds(lambda: kernel(*inputs)),
            plain_us=microseconds(lambda: fast(*inputs)),
            error=error(tensors(kernel(*inputs)), expected),
            plain_error=error(tensors(fast(*inputs)), expected),
        )


@contextmanager
def launched(module: ModuleType, **shape: int | None) -> Iterator[None]:
    """A module's launch shape replaced."""
    before = {name: vars(module)[name] for name in shape}
    vars(module).update(shape)
    try:
        yield
    finally:
        vars(module).update(before)


def bench_norms(bench: Bench, sweep: bool) -> None:
    """Norms with what is summed before and modulated after."""
    from arl2.inference import row_triton as kernels

    block, before = (
        bench.drawn(Block(bench.dim, 64, bench.heads, qk_norm=True, cross_attn_norm=True, eps=1e-6)) for _ in range(2)
    )
    x, added = bench.random(1, bench.tokens, bench.dim), bench.random(1, bench.tokens, bench.dim)
    time, stream = bench.random(1, FRAMES, 6, bench.dim) / 2, DeferredResidual(x, added, before.modulation)
    for fp8 in (False, True):
        fast, plain, true, tag = (
            new_fused_ops(fp8, kernels=True),
            FusedOps(fp8),
            FusedOps(fp8=False),
            ", e4m3" if fp8 else "",
        )
        for name, inputs in (
            ("before_self_attention", (block, stream, time)),
            ("before_cross_attention", (block, x, added, time)),
            ("before_feed_forward", (block, x, added, time)),
        ):
            kernel, usual, truth = (getattr(steps, name) for steps in (fast, plain, true))
            bench.compare(name + tag, kernel, usual, *inputs, truth=truth)
    for rows, warps in NORM_SHAPES if sweep else ():
        with launched(kernels, NORM_ROWS=rows, NORM_WARPS=warps):
            us, fp8_us = (
                microseconds(
                    lambda fast=new_fused_ops(fp8, kernels=True): fast.before_self_attention(block, stream, time)
                )
                for fp8 in (False, True)
            )
        bench.note(name=f"norm, {rows} rows, {warps} warps", us=us, e4m3_us=fp8_us)


def bench_heads(bench: Bench, sweep: bool) -> None:
    """Queries and keys of attention and of the state, and its read."""
    from arl2.inference import head_triton as head_kernels

    fast, plain, dim, heads = new_fused_ops(fp8=False, kernels=True), FusedOps(fp8=False), bench.dim, bench.heads
    layer = bench.drawn(HybridAttention(dim, heads, qk_norm=True, eps=1e-6, lora_rank=None, lora_alpha=1.0))
    whole = bench.random(1, bench.tokens, 4 * dim + heads)
    q, k, _, query = (whole[..., i * dim : (i + 1) * dim] for i in range(4))
    rotary = rotary_angles(torch.arange(9, 9 + FRAMES, device=bench.device), HEIGHT, WIDTH, dim // heads)
    normed, asked = [(layer.norm_q, q), (layer.norm_k, k)], [(layer.norm_q, query)]
    kernel, usual = (lambda *inputs, steps=steps: steps.normed_heads(*inputs)[0] for steps in (fast, plain))
    bench.compare("normed_heads: q, k, and a query measured", kernel, usual, normed, asked, heads, rotary)
    bench.compare("normed_heads: q of the text", kernel, usual, [(layer.norm_q, q)], [], heads, None)
    _, (factor,) = fast.normed_heads([], asked, heads, rotary)
    state = torch.randn(1, heads, dim // heads, dim // heads, device=bench.device)
    read_state = StateRead(state, query, factor, whole[..., 4 * dim :], rotary)
    mixed = bench.random(1, bench.tokens, heads, dim // heads) / 4
    delta_out = torch.empty_like(mixed)
    bench.compare("add_state_read", fast.add_state_read, plain.add_state_read, layer, mixed, read_state)

    def keys(steps: FusedOps) -> Tensor:
        steps.put_keys(layer, query, factor, rotary, delta_out)
        return delta_out

    fast_us, plain_us = (microseconds(lambda s=s: keys(s)) for s in (fast, plain))
    apart = error(tensors(keys(fast)), tensors(keys(plain)))
    bench.note(name="put_keys", us=fast_us, plain_uncompiled_us=plain_us, apart=apart)
    for rows, warps, registers in STATE_SHAPES if sweep else ():
        with launched(head_kernels, STATE_ROWS=rows, STATE_WARPS=warps, STATE_REGISTERS=registers):
            read = microseconds(lambda: fast.add_state_read(layer, mixed, read_state))
            put = microseconds(lambda: keys(fast))
        bench.note(name=f"state, {rows} rows, {warps} warps, {registers} registers", recalled_us=read, put_keys_us=put)


def bench_products(bench: Bench) -> None:
    """What surrounds products: GELU and quantisation."""
    from arl2.inference.row_triton import linear_gelu, quantize

    gelu, plain = nn.GELU(approximate="tanh"), FusedOps(fp8=True)
    x, hidden = bench.random(1, bench.tokens, bench.dim), bench.random(1, bench.tokens, bench.ffn)
    weight, bias = bench.random(bench.ffn, bench.dim) / bench.dim**0.5, bench.random(bench.ffn)
    bench.compare("quantize", new_fused_ops(fp8=True, kernels=True).operand, plain.operand, x, truth=lambda x: x)
    bench.compare(
        "gelu and quantize",
        lambda h: RowScaledFP8(*quantize(h, gelu=True)),
        lambda h: plain.operand(gelu(h)),
        hidden,
        truth=gelu,
    )
    bench.compare("product with gelu", linear_gelu, lambda x, w, b: gelu(F.linear(x, w, b)), x, weight, bias)
    bench.note(name="product alone", us=microseconds(lambda: F.linear(x, weight, bias)))


def bench_attention(bench: Bench) -> None:
    """Attention to the text, whose few keys suit backends differently, and in the block."""
    q = bench.random(1, bench.tokens, bench.heads, bench.dim // bench.heads)
    for name, keys in (("text", bench.text_len), ("own block", bench.tokens), ("window", 3 * bench.tokens)):
        k, v = (bench.random(1, keys, bench.heads, bench.dim // bench.heads) for _ in range(2))
        for backend in (AttentionBackend.AUTO, AttentionBackend.CUDNN, AttentionBackend.FLASH):
            us = microseconds(lambda k=k, v=v, backend=backend: attention(q, k, v, backend=backend))
            bench.note(name=f"attention to {name}, {backend}", us=us)


def bench_writes(bench: Bench, layers: int = 8) -> None:
    """The writes of some layers at once, by backend."""
    like, size = (layers, bench.tokens, bench.heads), bench.dim // bench.heads
    k, v = F.normalize(bench.random(*like, size).float(), dim=-1).to(HALF), bench.random(*like, size)
    decay, beta = (torch.rand(like, device=bench.device) for _ in range(2))
    state = torch.randn(layers, bench.heads, size, size, device=bench.device)
    for backend in (WriteBackend.FLA, WriteBackend.CHUNKED):
        recorded = backend is WriteBackend.FLA  # solvers of triangular systems cannot be
        us = microseconds(lambda b=backend: gated_delta_write(state, k, v, -decay, 2 * beta, backend=b), recorded)
        bench.note(name=f"writes of {layers} layers, {backend}", us=us)


@entry_point()
def main() -> int:
    """Parse, measure, write."""
    parser = Parser(__doc__)
    parser.add_argument("--json", type=as_path, required=True, metavar="PATH", help="where the figures go")
    parser.add_argument("--sweep", action="store_true", help="other launch shapes too")
    parser.add_argument("--device", help="cuda or cuda:N")
    arguments = parser.parse_args()
    device = choose_device(arguments.device)
    require_kernels(device, HALF)
    check_target(arguments.json)
    torch.manual_seed(0)
    bench = Bench(device)
    with torch.no_grad(), torch.cuda.device(device):
        bench_norms(bench, arguments.sweep)
        bench_heads(bench, arguments.sweep)
        bench_products(bench)
        bench_attention(bench)
        bench_writes(bench)
    page = {"device": device_name(device), "torch": torch.__version__, "rows": bench.rows}
    write_json(arguments.json, page)
    Console(soft_wrap=True, highlight=False).print(f"the figures are in {arguments.json}", markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
