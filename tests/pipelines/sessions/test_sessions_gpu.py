"""Sessions on a GPU: what changes between blocks reaches recorded passes, whatever they were recorded with."""

from typing import Any

import pytest
import torch
from gpu_models import GPU

from arl2.model import HybridSettings
from pipelines.config import MemoryConfig, MemoryKind, SpeedConfig
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.generation.sessions.session import Session

SIZE = {"height": 64, "width": 96}
WINDOW = MemoryConfig(MemoryKind.window, 9, 3)
RED, BLUE = "a red shape", "a blue shape"


def pipeline(layers: tuple[int, ...], **speed: Any) -> CausalVideoPipeline:
    made = random_pipeline("toy", HybridSettings(layers), device=GPU)
    if speed:
        made.optimize_for_inference(SpeedConfig(kernels=False, **speed))
    return made


def latents(session: Session, count: int) -> torch.Tensor:
    return torch.cat([session.next().latents_BFCHW for _ in range(count)], dim=1)


@pytest.mark.gpu
@pytest.mark.parametrize("on_switch", ["keep", "recompute"])
@pytest.mark.parametrize(("layers", "memory"), [((), "full"), ((), WINDOW), ((0, 1, 2), WINDOW)])
@pytest.mark.parametrize("speed", [{"compile": False, "cuda_graphs": True}, {"compile": True, "cuda_graphs": True}])
def test_a_switch_reaches_recorded_passes(
    layers: tuple[int, ...], memory: Any, on_switch: str, speed: dict[str, Any]
) -> None:
    """Enough blocks before the switch that the passes after it are replayed, and a switch back."""
    options: dict[str, Any] = {**SIZE, "seeds": [3], "memory": memory, "on_switch": on_switch}
    found = []
    for made in (pipeline(layers), pipeline(layers, **speed)):
        session = made.session(RED, **options)
        parts = [latents(session, 8)]
        for prompt in (BLUE, RED):
            session.switch(prompt)
            parts.append(latents(session, 2))
        found.append(torch.cat(parts, dim=1))
        unswitched = latents(made.session(RED, **options), 12)
        assert torch.equal(parts[0], unswitched[:, :24]) or speed["compile"]
        assert not torch.allclose(parts[1], unswitched[:, 24:30], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(found[1], found[0], rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [(), (0, 1, 2)])
def test_forks_in_turns_and_saved_sessions_go_on_alike(layers: tuple[int, ...], tmp_path: Any) -> None:
    """Each has texts and memory of its own, though they share recorded passes' buffers."""
    made = pipeline(layers, compile=False, cuda_graphs=True)
    session = made.session(RED, **SIZE, seeds=[3], memory=WINDOW)
    session.save(tmp_path / "first.safetensors")
    latents(session, 5)
    session.save(tmp_path / "held.safetensors")
    fork, loaded = session.fork(), made.load_session(tmp_path / "held.safetensors")
    blue = session.fork()
    blue.switch(BLUE)
    for _ in range(4):
        expected, other = latents(session, 1), latents(blue, 1)
        torch.testing.assert_close(latents(fork, 1), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(latents(loaded, 1), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(other, expected, rtol=1e-2, atol=1e-2)
