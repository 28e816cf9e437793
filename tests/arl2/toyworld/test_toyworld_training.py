"""Training the parts of the toy world: the optimiser, and a few steps of every model."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, new_memory, tiny_model
from torch import Tensor, nn

from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler, remember_block
from arl2.toyworld.training.muon import Muon, MuonWithAdam, orthogonalised
from arl2.toyworld.training.progress import Progress
from arl2.toyworld.training.train_teacher import (
    TransformerTraining,
    batches,
    distil_few_step,
    flow_after_clean,
    solver_levels,
    taught,
    teacher_loss,
    train,
    trajectories,
)
from arl2.toyworld.training.train_text import FACTS, TextTraining, facts_of, text_quality, train_text
from arl2.toyworld.training.train_vae import VAETraining, draw_clips, error_weight, object_mask, train_vae
from arl2.toyworld.world.captions import caption_scenes, names_answer
from arl2.toyworld.world.latents import LatentVideos, embed_captions, toy_text_encoder
from arl2.toyworld.world.scenes import COLOURS, SHAPES, WALLS, sample_scenes
from wan.model import PassOutput
from wan.utils.errors import InputError


def test_orthogonalised_matrices_keep_their_singular_vectors() -> None:
    for shape in ((3, 5, 9), (3, 9, 5), (1, 4, 4)):
        matrices = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrices, full_matrices=False)
        singular = torch.linalg.svdvals(orthogonalised(matrices))
        assert singular.min() > 0.6 and singular.max() < 1.3
        inner = u.mT @ orthogonalised(matrices) @ vh.mT
        off_diagonal = inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))
        assert off_diagonal.abs().max() < 1e-3


def test_muon_steps_alike_whatever_is_stepped_with_it() -> None:
    weights = [nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(4, 2, 3)), nn.Parameter(torch.randn(5, 5))]
    gradients = [torch.randn_like(weight) for weight in weights]
    results = []
    for groups in ([weights], [[weight] for weight in weights]):
        copies = {id(weight): nn.Parameter(weight.detach().clone()) for weight in weights}
        for group in groups:
            optimizer = Muon([copies[id(weight)] for weight in group], lr=0.1)
            for _ in range(2):
                for weight, gradient in zip(weights, gradients, strict=True):
                    copies[id(weight)].grad = gradient.clone()
                optimizer.step()
        results.append([copies[id(weight)] for weight in weights])
    for together, alone in zip(*results, strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_every_parameter_has_one_optimiser() -> None:
    module = nn.ModuleDict({"a": nn.Conv2d(3, 4, 3), "end": nn.Linear(4, 2), "norm": nn.LayerNorm(4)})
    both = MuonWithAdam(module, 10, 0.1, 0.1, adam_names=("end",))
    optimizers = (both.muon, both.adam)
    sets = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    assert not sets[0] & sets[1] and sets[0] | sets[1] == {id(p) for p in module.parameters()}
    assert sets[0] == {id(module["a"].weight)}


def test_clips_are_a_function_of_the_seed() -> None:
    settings = VAETraining(batch=2, clip_frames=(5, 9))
    device = torch.device("cpu")
    first, again = draw_clips(settings, device), draw_clips(settings, device)
    lengths: list[int] = []
    for _ in range(5):
        (pixels, mask), (pixels_again, mask_again) = next(first), next(again)
        assert torch.equal(pixels, pixels_again) and torch.equal(mask, mask_again)
        lengths.append(pixels.shape[2])
        assert pixels.shape == (2, 3, lengths[-1], 64, 96) and mask.shape == (2, 1, lengths[-1], 64, 96)
        assert pixels.min() >= -1 and pixels.max() <= 1
    assert lengths == [5] * 4 + [9]


def test_the_mask_is_where_objects_are_seen() -> None:
    scenes = sample_scenes(torch.arange(8), mix={"occlusion": 1.0})
    mask = object_mask(scenes, torch.tensor([0, 38]))
    assert (mask[:, 0].sum((1, 2)) > 200).all(), "seen at first"
    assert not mask[:, 1].any(), "hidden in the middle"


def test_errors_beside_an_object_weigh_as_much_as_within() -> None:
    mask = torch.zeros(2, 1, 3, 64, 96)
    mask[1, 0, 2, 20:30, 40:50] = 1
    weight = error_weight(mask, VAETraining(near=3, near_weight=10.0, object_weight=10.0))
    assert weight[1, 0, 2, 17:33, 37:53].eq(10).all() and weight.eq(10).sum() == 16 * 16
    heavier = error_weight(mask, VAETraining(near=3, near_weight=10.0, object_weight=30.0))
    assert torch.equal(heavier - weight, 20 * mask)
    assert weight[0].eq(1).all() and weight[1, 0, 1].eq(1).all()


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    data = tiny_data()

    def loss_of(batch: LatentVideos, generator: torch.Generator) -> Tensor:
        noise = torch.randn(batch.latents_NFCHW.shape, generator=generator)
        return teacher_loss(model, batch.latents_NFCHW, batch.text_NTD, noise, torch.rand(2, 2, generator=generator))

    settings, results = TransformerTraining(steps=4, batch=2), []
    for stop in (None, 3):
        file = tmp_path / f"{stop}.partial"
        progress = Progress(file, every=2)
        for _ in range(2 if stop else 1):
            torch.manual_seed(0)
            model = tiny_model(dtype=torch.float32)
            steps = iter(range(stop or 99))

            def counted(*arguments: Any, steps: Iterator[int] = steps) -> Tensor:
                if next(steps, None) is None:
                    raise KeyboardInterrupt
                return loss_of(*arguments)

            with suppress(KeyboardInterrupt):
                train(model, settings, data, counted, lambda step, loss: None, progress)
        assert torch.load(file, weights_only=True)["steps"] == 2  # the last step is kept by no one but the caller
        results.append({name: value.clone() for name, value in model.state_dict().items()})
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
    with pytest.raises(InputError, match=r"other settings \(seed was nothing, is 1\)"):
        train(model, settings, data, loss_of, lambda step, loss: None, Progress(file, of={"seed": 1}))
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"PK" + whole[2:200]):
        file.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*\.partial .*it is damaged; delete it"):
            train(model, settings, data, loss_of, lambda step, loss: None, Progress(file))


def test_the_vae_trains_and_measures_its_latents() -> None:
    reports: list[tuple[int, float, float]] = []
    settings = VAETraining(steps=2, batch=1, clip_frames=(1,))
    vae = train_vae(settings, torch.device("cpu"), lambda *report: reports.append(report), normalising_videos=1)
    assert [step for step, _, _ in reports] == [1, 2]
    assert len(vae.model.config.latents_std) == 16 and min(vae.model.config.latents_std) > 0


BATCH, BLOCKS = 2, 2


def tiny_data() -> LatentVideos:
    """Random latents and text of the sizes that the tiny model takes."""
    latents = torch.randn(8, 6, TINY["in_dim"], 4, 6).half()
    return LatentVideos(latents, *torch.randn(2, 8, 5, TINY["text_dim"]).half())


def test_the_teachers_loss_is_the_loss_of_the_block_loop() -> None:
    model, clean = tiny_model(), torch.randn(BATCH, 6, TINY["in_dim"], 4, 6, dtype=torch.float64)
    noise, text = torch.randn_like(clean), torch.randn(BATCH, 5, TINY["text_dim"], dtype=torch.float64)
    sigma = torch.rand(BATCH, BLOCKS, dtype=torch.float64)
    expected, memory, embedded = 0.0, new_memory(model), model.embed_text(text)
    with torch.no_grad():
        for block in range(BLOCKS):
            frames, level = slice(3 * block, 3 * block + 3), sigma[:, block, None, None, None, None]
            noisy = (1 - level) * clean[:, frames] + level * noise[:, frames]
            times = (1000 * sigma[:, block, None]).expand(-1, 3)
            views, positions = memory.read(18), torch.arange(3 * block, 3 * block + 3)
            flow = model(noisy, times, embedded, views, positions).flow
            expected += (flow.float() - (noise - clean)[:, frames]).square().mean().item() / BLOCKS
            remember_block(model, clean[:, frames], embedded, memory, 3 * block)
        assert abs(teacher_loss(model, clean, text, noise, sigma).item() - expected) < 1e-5


def test_openings_are_first_blocks_and_every_block_counts_alike() -> None:
    data, generator = tiny_data(), torch.Generator().manual_seed(0)
    settings = TransformerTraining(batch=3, openings=2)
    (videos, of_videos), (openings, of_openings) = batches(settings, data, generator)
    assert videos.latents_NFCHW.shape[:2] == (3, 6) and openings.latents_NFCHW.shape[:2] == (2, 3)
    row = [torch.equal(openings.latents_NFCHW[0], video) for video in data.latents_NFCHW[:, :3].float()].index(True)
    assert torch.equal(openings.text_NTD[0], data.text_NTD[row].float())
    assert torch.equal(openings.untold_NTD[0], data.untold_NTD[row].float())
    assert (of_videos, of_openings) == (6 / 8, 2 / 8)
    assert [weight for _, weight in batches(TransformerTraining(batch=3), data, generator)] == [1]


def test_an_opening_has_nothing_before_it() -> None:
    """Its loss is that of the first block of a whole video."""
    model, clean = tiny_model(), torch.randn(BATCH, 6, TINY["in_dim"], 4, 6, dtype=torch.float64)
    noise, text = torch.randn_like(clean), torch.randn(BATCH, 5, TINY["text_dim"], dtype=torch.float64)
    levels = torch.rand(BATCH, 6, dtype=torch.float64)
    with torch.no_grad():
        whole = flow_after_clean(model, noise, levels, text, clean)
        alone = flow_after_clean(model, noise[:, :3], levels[:, :3], text, clean[:, :3])
    torch.testing.assert_close(alone, whole[:, :3])
    assert not torch.equal(alone, whole[:, 3:])


def test_training_lowers_the_loss_on_one_batch() -> None:
    torch.manual_seed(0)
    model = tiny_model(dtype=torch.float32)
    latents, text, noise = torch.randn(2, 6, 4, 4, 6), torch.randn(2, 5, 12), torch.randn(2, 6, 4, 4, 6)
    losses: list[float] = []
    settings = TransformerTraining(steps=120, batch=2, muon_lr=0.02, adam_lr=5e-3)
    train(
        model,
        settings,
        tiny_data(),
        lambda *_: teacher_loss(model, latents, text, noise, torch.full((2, 2), 0.7)),
        lambda step, loss: losses.append(loss),
    )
    assert losses[-1] < 0.7 * losses[0]


def test_the_solver_visits_the_generators_levels() -> None:
    sampler = FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
    sigmas, places = solver_levels(sampler, 8)
    assert len(sigmas) == 8 and sigmas == sorted(sigmas, reverse=True)
    assert [sigmas[place] for place in places] == list(sampler.sigmas)


def test_a_straight_flow_is_followed_to_its_end() -> None:
    target, noise = torch.randn(1, 3, 4, 4, 6), torch.randn(1, 3, 4, 4, 6)
    straight = noise - target
    visited, end = trajectories_of(straight, noise, [1.0, 0.9, 0.5, 0.2])
    torch.testing.assert_close(end, target, rtol=1e-5, atol=1e-5)
    for sigma, x_t in zip([1.0, 0.9, 0.5, 0.2], visited, strict=True):
        torch.testing.assert_close(x_t, (1 - sigma) * target + sigma * noise, rtol=1e-5, atol=1e-5)


def trajectories_of(flow: torch.Tensor, noise: torch.Tensor, sigmas: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    """Trajectories of a model whose flow is constant."""

    class Constant(HybridWanModel):
        def forward(self, latents: torch.Tensor, *arguments: object, **options: object) -> PassOutput:
            return PassOutput(torch.cat([flow] * (latents.shape[1] // flow.shape[1]), dim=1), None)

    batch = LatentVideos(torch.zeros_like(flow), *torch.zeros(2, 1, 5, 12))
    return trajectories(Constant(**TINY), batch, noise, sigmas)


def test_guidance_goes_beyond_the_caption() -> None:
    model, data = tiny_model(dtype=torch.float32), tiny_data()
    batch, noise = data.batch(torch.Generator().manual_seed(0), 2, 3), torch.randn(2, 3, TINY["in_dim"], 4, 6)
    levels, ends = torch.ones(2, 3), {}
    with torch.no_grad():
        told, untold = (
            flow_after_clean(model, noise, levels, text, batch.latents_NFCHW)
            for text in (batch.text_NTD, batch.untold_NTD)
        )
    for guidance in (0.0, 1.0, 2.5):
        ends[guidance] = trajectories(model, batch, noise, [1.0], guidance)[1]
    torch.testing.assert_close(ends[0.0], noise - untold)
    torch.testing.assert_close(ends[1.0], noise - told)
    torch.testing.assert_close(ends[2.5], noise - untold - 2.5 * (told - untold))
    assert not torch.allclose(ends[0.0], ends[1.0])


def test_first_blocks_are_taught_by_openings_where_there_are_any() -> None:
    video, opening = torch.randn(2, 6, 1, 1, 1), torch.randn(2, 3, 1, 1, 1)
    with_openings, without = TransformerTraining(openings=2), TransformerTraining()
    assert torch.equal(taught(video, with_openings), video[:, 3:]) and torch.equal(taught(video, without), video)
    assert torch.equal(taught(opening, with_openings), opening)


def test_a_generator_learns_from_a_teacher_that_stays_as_it_is() -> None:
    teacher = tiny_model(dtype=torch.float32)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    losses: list[float] = []
    sampler = FewStepSampler.from_steps([1000, 500], 5.0)
    settings = TransformerTraining(steps=30, batch=4, muon_lr=0.01, adam_lr=1e-3, openings=4, guidance=2.0)
    student = distil_few_step(
        settings, teacher, tiny_data(), sampler, lambda _, loss: losses.append(loss), solver_steps=4
    )
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert losses[-1] < losses[0] and not torch.equal(student.head.head.weight, teacher.head.head.weight)


def test_facts_are_what_captions_say() -> None:
    scenes = sample_scenes(torch.arange(64), mix={"binding": 0.5, "occlusion": 0.5})
    captions = caption_scenes(scenes)
    facts = dict(zip(FACTS, facts_of(scenes, captions).T.tolist(), strict=True))
    assert facts["kind"] == scenes.kind.tolist()
    for row, caption in enumerate(captions):
        said = {
            "upper colour": COLOURS,
            "lower colour": COLOURS,
            "upper shape": SHAPES,
            "lower shape": SHAPES,
            "wall": WALLS,
        }
        words = [[*options, None][facts[name][row]] for name, options in said.items()]
        upper, lower = f"{words[0]} {words[2]}", f"{words[1]} {words[3]}"
        assert (words[0] is None) == (not names_answer(caption)) and (words[0] is None) == (words[2] is None)
        assert (words[1] is not None) == (" above and " in caption) == (words[3] is not None)
        assert words[0] is None or upper in caption
        assert words[1] is None or caption.index(f"{upper} above and") < caption.index(f"{lower} below")
        assert f"the {words[4]} wall" in caption if words[4] else "the wall" in caption


def test_the_text_encoder_learns_what_captions_say() -> None:
    encoder, losses = toy_text_encoder(), list[float]()
    untrained = toy_text_encoder().encode(["a red ring moves"])
    settings = TextTraining(steps=30, batch=32, captions=64)
    reader = train_text(encoder, settings, lambda _, loss: losses.append(loss))
    assert losses[-1] < 0.6 * losses[0]
    assert not any(parameter.requires_grad for parameter in encoder.model.parameters())
    assert not torch.equal(encoder.encode(["a red ring moves"]), untrained)
    quality = text_quality(encoder, reader, captions=16)
    assert set(quality) == {*FACTS, "least"} and quality["least"] == min(quality[name] for name in FACTS)


def test_captions_embed_alike_wherever_they_stand() -> None:
    encoder = toy_text_encoder()
    first = embed_captions(encoder, ["a red ring rolls", "a shape rolls", "a red ring rolls"])
    assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
    assert torch.equal(
        first, embed_captions(toy_text_encoder(), ["a red ring rolls", "a shape rolls", "a red ring rolls"])
    )
    names = caption_scenes(sample_scenes(torch.arange(200)))
    unknown = encoder.tokenizer.unk_token_id
    assert all(unknown not in encoder.tokenizer(name)["input_ids"] for name in names)
