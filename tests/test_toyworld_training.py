"""Training parts of the toy world: the optimiser, and a few steps of the VAE."""

import torch
from torch import nn

from arl2.toyworld.muon import Muon, muon_and_adam, orthogonalised
from arl2.toyworld.train_vae import VAETraining, draw_clips, object_mask, train_vae
from arl2.toyworld.world import sample_scenes


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
    optimizers = muon_and_adam(module, 0.1, 0.1, adam_names=("end",))
    sets = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in optimizers]
    assert not sets[0] & sets[1] and sets[0] | sets[1] == {id(p) for p in module.parameters()}
    assert sets[0] == {id(module["a"].weight)}


def test_clips_are_a_function_of_the_seed() -> None:
    settings = VAETraining(batch=2, clip_frames=5)
    device = torch.device("cpu")
    first, again = draw_clips(settings, device), draw_clips(settings, device)
    for _ in range(5):
        (pixels, mask), (pixels_again, mask_again) = next(first), next(again)
        assert torch.equal(pixels, pixels_again) and torch.equal(mask, mask_again)
        assert pixels.shape == (2, 3, 5, 64, 96) and mask.shape == (2, 1, 5, 64, 96)
        assert pixels.min() >= -1 and pixels.max() <= 1


def test_the_mask_is_where_objects_are_seen() -> None:
    scenes = sample_scenes(torch.arange(8), mix={"occlusion": 1.0})
    mask = object_mask(scenes, torch.tensor([0, 38]))
    assert (mask[:, 0].sum((1, 2)) > 200).all(), "seen at first"
    assert not mask[:, 1].any(), "hidden in the middle"


def test_the_vae_trains_and_measures_its_latents() -> None:
    reports: list[tuple[int, float, float]] = []
    settings = VAETraining(steps=2, batch=1, clip_frames=1)
    vae = train_vae(settings, torch.device("cpu"), lambda *report: reports.append(report), normalising_videos=1)
    assert [step for step, _, _ in reports] == [1, 2]
    assert len(vae.model.config.latents_std) == 16 and min(vae.model.config.latents_std) > 0
