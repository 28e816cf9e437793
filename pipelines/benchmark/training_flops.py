"""Floating-point operations of a training step, counted from shapes as in `pipelines.benchmark.flops`.

A product x·W costs as much again for the gradient of x, where something before it learns, and for that of W, where W
learns; frozen weights cost no second product. Attention costs twice its forward, or once where only the queries have a
gradient (the text's keys and values have none). What is computed a second time, because checkpointing did not keep it,
is counted apart; what attention kernels compute a second time of their own accord is not counted. Nor is what the
parallel path computes though nobody needs it: in stage 2 the last block's clean pass, and in clean passes the last
layer's output.
"""

from dataclasses import dataclass, field

from arl2.model import HybridWanModel
from pipelines.benchmark.flops import Flops, ends_flops, hybrid_flops, pass_flops


@dataclass(frozen=True)
class StepFlops:
    """Operations of one step on one video.

    Attributes:
        teacher, student: their forwards.
        backward: all gradients.
        recomputation: forwards that checkpointing repeats.
    """

    teacher: Flops = field(default_factory=Flops)
    student: Flops = field(default_factory=Flops)
    backward: Flops = field(default_factory=Flops)
    recomputation: Flops = field(default_factory=Flops)

    @property
    def model(self) -> int:
        """What the mathematics asks for."""
        return self.teacher.total + self.student.total + self.backward.total

    @property
    def hardware(self) -> int:
        """What is computed."""
        return self.model + self.recomputation.total


def stage1_flops(student: HybridWanModel, teacher: HybridWanModel, frames: int, tokens: int, blocks: int) -> StepFlops:
    """A step of stage 1 with one level a block, clean passes read, on the loop path.

    Args:
        student: hybrid in the layers that learn; only its shapes are used.
        teacher: the softmax model; likewise.
        frames, tokens: of a block.
        blocks: of the video.
    """
    dim, last = student.config.dim, student.config.num_layers - 1
    layers, watched = len(student.hybrid.layers), Flops()
    step = StepFlops()
    for block in range(blocks):
        keys, remembered = (block + 1) * tokens, block + 1 < blocks
        if last in student.hybrid.layers:  # whose output the clean pass does not need, but the comparison does
            watched = Flops(2 * tokens * dim * 4 * dim, 4 * tokens * keys * dim)
        both = [pass_flops(teacher, frames, tokens, keys, remember) for remember in (False, True)]
        reads = [hybrid_flops(student, tokens, True, remember) * layers for remember in (False, remembered)]
        back = [_hybrid_backward(student, tokens, False, True, remember, block > 0) for remember in (False, remembered)]
        step = StepFlops(
            step.teacher + both[0] + both[1] + watched,
            step.student + reads[0] + reads[1],
            step.backward + (back[0] + back[1]) * layers,
        )
    return step


def stage2_flops(
    student: HybridWanModel,
    teacher: HybridWanModel,
    frames: int,
    tokens: int,
    blocks: int,
    checkpointing: bool,
    window_tokens: int | None = None,
    with_teacher: bool = True,
) -> StepFlops:
    """A step of stage 2 with one level a block and context from data, on the loop path; see `stage1_flops`.

    Args:
        window_tokens: of both models' softmax layers; None for full memory.
        with_teacher: whether the teacher runs.
    """
    step = StepFlops()
    for block in range(blocks):
        keys = (block + 1) * tokens if window_tokens is None else min((block + 1) * tokens, window_tokens)
        for remember in (False, True)[: 1 + (block + 1 < blocks)]:
            blocks_forward = _blocks_forward(student, frames, tokens, keys, remember)
            step = StepFlops(
                step.teacher + pass_flops(teacher, frames, tokens, keys, remember) * with_teacher,
                step.student + blocks_forward + ends_flops(student, frames, tokens, remember),
                step.backward + _student_backward(student, tokens, keys, remember, block > 0),
                step.recomputation + blocks_forward * checkpointing,
            )
    return step


def _blocks_forward(model: HybridWanModel, frames: int, tokens: int, keys: int, remember: bool) -> Flops:
    """The blocks in a pass whose feed-forward adapters are products of their own."""
    config, adapted = model.config, model.hybrid.ffn_lora_layers(model.config.num_layers)
    attending = [layer for layer in adapted if not (remember and layer == config.num_layers - 1)]
    adapters = 4 * tokens * (model.hybrid.lora_rank or 0) * (config.dim + config.ffn_dim) * len(attending)
    ends = ends_flops(model, frames, tokens, remember)
    return pass_flops(model, frames, tokens, keys, remember) + Flops(adapters - ends.linear)


def _student_backward(model: HybridWanModel, tokens: int, keys: int, remember: bool, state_learns: bool) -> Flops:
    """Gradients of a pass over one block."""
    config = model.config
    dim, ffn, last = config.dim, config.ffn_dim, config.num_layers - 1
    adapted = set(model.hybrid.ffn_lora_layers(config.num_layers))
    first = min(adapted | set(model.hybrid.layers), default=config.num_layers)
    patch = model.patch_size[0] * model.patch_size[1] * model.patch_size[2]
    total = Flops() if remember else Flops(2 * tokens * dim * config.out_dim * patch)
    for layer in range(first, config.num_layers):
        attends, input_learns = not (remember and layer == last), layer > first
        if layer in model.hybrid.layers:
            total += _hybrid_backward(model, tokens, input_learns, attends, remember, state_learns)
        elif input_learns:
            total += Flops(2 * tokens * dim * dim * (4 if attends else 2), 8 * tokens * keys * dim if attends else 0)
        if not attends:
            continue
        mixed_learns = input_learns or layer in model.hybrid.layers
        if mixed_learns:
            total += Flops(2 * tokens * dim * (2 * dim + ffn), 4 * tokens * config.text_len * dim)
        total += Flops(2 * tokens * dim * ffn)  # the second linear's
        if layer in adapted:
            rank = model.hybrid.lora_rank or 0
            total += Flops(_adapter_backward(tokens, dim, ffn, rank, mixed_learns))
            total += Flops(_adapter_backward(tokens, ffn, dim, rank, True))
    return total


def _hybrid_backward(
    model: HybridWanModel, tokens: int, input_learns: bool, attends: bool, remember: bool, state_learns: bool
) -> Flops:
    """Gradients of one hybrid layer's self-attention; the state that it reads may have one too."""
    dim, heads, head_dim = model.config.dim, model.config.num_heads, model.head_dim
    rank = model.hybrid.lora_rank or 0
    unit, small = 2 * tokens * dim * head_dim, 2 * tokens * dim * heads * (1 + input_learns)
    mapped = unit * (2 if input_learns or rank else 1)
    adapter = _adapter_backward(tokens, dim, dim, rank, input_learns)
    projections = 2 * tokens * dim * dim * input_learns
    total = Flops(2 * projections)  # k and v
    if attends:
        local = 8 * tokens * tokens * dim * input_learns
        linear = projections + 2 * tokens * dim * dim + small + mapped + adapter  # q and o, gate, φ_q, Δ_q
        total += Flops(linear, local, unit * (1 + state_learns))
    if remember:
        total += Flops(2 * (small + mapped + adapter), state=4 * unit)
    return total


def _adapter_backward(tokens: int, inputs: int, outputs: int, rank: int, input_learns: bool) -> int:
    """Gradients of x·A·B."""
    return 2 * tokens * rank * (2 * outputs + (1 + input_learns) * inputs)
