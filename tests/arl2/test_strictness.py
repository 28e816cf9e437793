"""Random damage to checkpoints: each is refused in one line, or what loads is exactly what it should be."""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tiny_models import HYBRID, TINY, new_memory, tiny_model, tiny_video

from arl2.checkpoint import LoadReport, build_hybrid, read_generator
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.statement import hybrid_layer_of
from arl2.trained_memory import TrainedMemory
from wan.checkpoints.formats import transformer_config
from wan.checkpoints.loading import StateDict
from wan.checkpoints.record import RECORD
from wan.utils.errors import InputError

FAST_DRAWS, SLOW_DRAWS = 60, 2000
MODELS = {
    "adapted": HYBRID,
    "adapted everywhere": replace(HYBRID, ffn_lora=FFNLoRA.ALL),
    "without adapters": HybridSettings((1,)),
    "all layers": HybridSettings((0, 1, 2)),
    "softmax": HybridSettings(),
}
# Names in a .pt, and whether it records how it was made.
PICKLES = {
    "generator": ("model.{}", True),
    "foreign generator": ("model._fsdp_wrapped_module.{}", False),
    "names alone": ("{}", False),
    "comfy": ("model.diffusion_model.{}", False),
}
FORMS = ("folder", "safetensors", "hybrid alone", *PICKLES)
DTYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64)
ODD_VALUES = (None, 0, -1, 1, 2, 5, 7, 1e9, 10**20, float("nan"), float("inf"), 1e-5, True, "x", [], [0], [99], {})


@dataclass
class Content:
    """What a checkpoint's files hold, before they are written."""

    form: str
    state: StateDict
    config: dict[str, Any]
    record: dict[str, Any]


@dataclass(frozen=True)
class Loaded:
    """A model, what loading said of it, and its output."""

    model: HybridWanModel
    report: LoadReport
    flow: torch.Tensor


class World:
    """Original models, and a folder to write their damaged copies to."""

    def __init__(self, root: Path) -> None:
        torch.manual_seed(5)
        self.root = root
        self.models = {name: tiny_model(hybrid, torch.float32) for name, hybrid in MODELS.items()}
        for model in self.models.values():
            model.set_trained_memory(TrainedMemory(6, 3, 9))
        self.models["softmax"].save_pretrained(root / "softmax")
        self.video = tiny_video(3, 1, torch.float32)
        self.pristine: dict[Any, Loaded | InputError] = {}
        self.written = 0

    def content(self, name: str, form: str) -> Content:
        """The files of an undamaged model."""
        model = self.models[name]
        config = {"_class_name": "HybridWanModel"} | json.loads(json.dumps(model.record()))
        state = {key: value.detach().clone() for key, value in model.state_dict().items()}
        if form == "hybrid alone":
            state = {key: value for key, value in state.items() if key in model.hybrid_parameter_names()}
        recorded = form not in PICKLES or PICKLES[form][1]
        return Content(form, state, config, model.record() if recorded else {})

    def write(self, content: Content) -> Path:
        """Write files; each time under another name, since loaded weights may still be mapped from the old ones."""
        self.written += 1
        path = self.root / f"{self.written}"
        metadata = {"format": "pt"} | ({RECORD: json.dumps(content.record)} if content.record else {})
        if content.form == "folder":
            path.mkdir()
            (path / "config.json").write_text(json.dumps(content.config))
            save_file(content.state, path / "diffusion_pytorch_model.safetensors", metadata)
            return path
        if content.form in PICKLES:
            path = path.with_suffix(".pt")
            named = {PICKLES[content.form][0].format(key): value for key, value in content.state.items()}
            wrapped = {"generator": named} if "generator" in content.form else named
            torch.save(wrapped | ({RECORD: content.record} if content.record else {}), path)
            return path
        path = path.with_suffix(".safetensors")
        save_file(content.state, path, metadata)
        return path

    def load(self, content: Content, wanted: HybridSettings) -> Loaded | InputError:
        """Write and load; anything but a model or an `InputError` is raised."""
        path = self.write(content)
        try:
            weights = read_generator(self.root / "softmax", path)
            sizes = transformer_config(path) if content.form == "folder" else dict(TINY)
            cpu = torch.device("cpu")
            model, report = build_hybrid(weights, sizes, wanted, dtype=torch.float32, device=cpu)
        except InputError as error:
            return error
        finally:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return Loaded(model, report, self.flow(model))

    def original(self, name: str, form: str, wanted: HybridSettings) -> Loaded | InputError:
        """What the undamaged files give for a request."""
        key = (name, form, wanted)
        if key not in self.pristine:
            self.pristine[key] = self.load(self.content(name, form), wanted)
        return self.pristine[key]

    @torch.no_grad()
    def flow(self, model: HybridWanModel) -> torch.Tensor:
        """The output for a block."""
        video = self.video
        views = new_memory(model, batch=1).read(18)
        flow = model(video.noisy, video.timesteps, video.text, views, torch.arange(3)).flow
        assert flow is not None
        return flow


def chosen_name(draw: random.Random, state: StateDict) -> str:
    hybrid = [name for name in sorted(state) if hybrid_layer_of(name) is not None or "lora" in name]
    return draw.choice(hybrid if hybrid and draw.random() < 0.7 else sorted(state))


def delete(draw: random.Random, content: Content) -> str:
    names = [chosen_name(draw, content.state)]
    scope = draw.choice(["one", "one", "alike", "layer", "all"])
    tail = names[0].split(".", 2)[-1]
    head = names[0].rsplit(".self_attn.", 1)[0]
    if scope == "alike":
        names = [name for name in content.state if name.endswith(tail)]
    elif scope == "layer" and hybrid_layer_of(names[0]) is not None:
        names = [name for name in content.state if name.startswith(head) and hybrid_layer_of(name) is not None]
    elif scope == "all":
        names = [name for name in content.state if hybrid_layer_of(name) is not None]
    for name in names:
        del content.state[name]
    return f"delete {scope} {names[:2]}"


def rename(draw: random.Random, content: Content) -> str:
    name = chosen_name(draw, content.state)
    others = [name + "x", "x." + name, "model." + name, "module." + name, name.replace("blocks.1", "blocks.7")]
    others += [name.replace(".0.", ".1.", 1), name.replace("_q", "_k"), name.upper(), name[:-1], "", "\x1b[1m\n"]
    other = draw.choice(others)
    content.state[other] = content.state.pop(name)
    return f"rename {name!r} {other!r}"


def reshape(draw: random.Random, content: Content) -> str:
    name = chosen_name(draw, content.state)
    value = content.state[name]
    ways: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda x: x.flatten()[:-1],
        lambda x: x[None],
        lambda x: x.flatten().repeat(2),
        lambda x: torch.zeros(0),
        lambda x: x.flatten()[0],
        lambda x: x[..., :1] if x.shape[-1] > 1 else x[None],
    ]
    content.state[name] = draw.choice(ways)(value).contiguous()
    return f"reshape {name} {tuple(content.state[name].shape)}"


def retype(draw: random.Random, content: Content) -> str:
    name, dtype = chosen_name(draw, content.state), draw.choice(DTYPES)
    content.state[name] = content.state[name].to(dtype)
    return f"retype {name} {dtype}"


def spoil(draw: random.Random, content: Content) -> str:
    name, value = chosen_name(draw, content.state), draw.choice([float("nan"), float("inf"), float("-inf")])
    if content.state[name].is_floating_point() and content.state[name].numel():
        content.state[name].flatten()[draw.randrange(content.state[name].numel())] = value
    return f"spoil {name} {value}"


def duplicate(draw: random.Random, content: Content) -> str:
    name = chosen_name(draw, content.state)
    other = draw.choice(["module.", "_orig_mod.", "model.", "x."]) + name
    content.state[other] = content.state[name] + 1
    return f"duplicate {name} as {other}"


def edit(draw: random.Random, content: Content) -> str:
    target = content.config if content.form == "folder" and draw.random() < 0.7 else content.record
    # What a bare file alone says cannot contradict anything.
    alone = set() if content.form == "folder" else {"lora_alpha", "trained_memory"}
    key = draw.choice([*sorted(target.keys() - alone), "unknown", "window_size"])
    if draw.random() < 0.3:
        target.pop(key, None)
        return f"remove setting {key}"
    target[key] = draw.choice(ODD_VALUES)
    return f"set {key} to {target[key]!r}"


DAMAGES = (delete, delete, delete, rename, reshape, retype, spoil, duplicate, edit, edit, edit)


def request(draw: random.Random) -> HybridSettings:
    """A request, most often none."""
    if draw.random() < 0.5:
        return HybridSettings(lora_alpha=draw.choice([32.0, HYBRID.lora_alpha]))
    return HybridSettings(
        draw.choice([(), (0,), (1,), (0, 2), (2, 0), (0, 1, 2), (3,), (1, 1)]),
        draw.choice([None, None, 3, 4, 25]),
        draw.choice([32.0, HYBRID.lora_alpha, 5.0]),
        draw.choice(list(FFNLoRA)),
    )


def fault_of(
    loaded: Loaded, original: Loaded | InputError, whole: HybridWanModel, content: Content, wanted: HybridSettings
) -> str | None:
    """What is wrong with a model that loaded; None if it is the original or the conversion asked for.

    Args:
        loaded: from damaged files.
        original: what the undamaged files give for the same request.
        whole: the model that was saved.
    """
    held = {hybrid_layer_of(name.split("model.")[-1]) for name in content.state}
    new = {hybrid_layer_of(name) for name in loaded.report.untrained} - {None}
    if new & held or not new <= set(wanted.layers):
        return f"untrained layers {new}, the file holds {held}, the request says {wanted.layers}"
    state, expected = loaded.model.state_dict(), whole.state_dict()
    if (
        isinstance(original, InputError)
        or loaded.model.hybrid.layers != original.model.hybrid.layers
        or loaded.report.untrained != original.report.untrained
    ):
        # Files that say nothing of their layers are told by their names: a layer without any is a softmax layer.
        if content.record.get("hybrid_layers") is not None or content.form == "folder":
            return f"layers {loaded.model.hybrid.layers}, the record says {content.record.get('hybrid_layers')}"
        gone = held - {None} - set(loaded.model.hybrid.layers) - (set(whole.hybrid.layers) - set(wanted.layers))
        if gone or (isinstance(original, InputError) and held - {None}):
            return f"layers {gone} became softmax, the file holds {held}; undamaged: {original}"
        plain = {name.replace(".linear.", "."): value for name, value in expected.items()}
        names = [name for name in state if name not in loaded.report.untrained]
        wrong = [name for name in names if not torch.equal(state[name], plain[name.replace(".linear.", ".")])]
        return f"other values in {wrong}" if wrong else None
    expected = original.model.state_dict()
    if state.keys() != expected.keys():
        return f"other names {sorted(state.keys() ^ expected.keys())}"
    wrong = [name for name in state if not torch.equal(state[name], expected[name])]
    if wrong:
        return f"other values in {wrong}"
    if not torch.equal(loaded.flow, original.flow):
        return "another output"
    if loaded.model.trained_memory != original.model.trained_memory and "trained_memory" in content.record:
        return f"another memory {loaded.model.trained_memory}"
    return None


def check(world: World, seed: int) -> None:
    """One draw: damage, load, compare."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    name, form = draw.choice(list(MODELS)), draw.choice(FORMS)
    if form == "hybrid alone" and name == "softmax":
        form = "folder"
    wanted = request(draw) if draw.random() < 0.6 else HybridSettings(lora_alpha=HYBRID.lora_alpha)
    content = world.content(name, form)
    done = []
    for _ in range(draw.choice([1, 1, 1, 2])):
        if content.state:  # a file of hybrid weights alone may be empty by now
            done.append(draw.choice(DAMAGES)(draw, content))
    about = f"seed {seed}: {name} as {form}, {'; '.join(done)}, asked for {wanted}"
    try:
        loaded = world.load(content, wanted)
    except Exception as error:
        raise AssertionError(f"{about}: {type(error).__name__} {error}") from error
    if isinstance(loaded, InputError):
        message = str(loaded)
        assert "\n" not in message and message.isprintable() and 20 < len(message) < 900, (about, message)
        return
    fault = fault_of(loaded, world.original(name, form, wanted), world.models[name], content, wanted)
    assert fault is None, f"{about}: {fault}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    yield World(tmp_path_factory.mktemp("strictness"))


def test_undamaged_files_load_in_every_form(world: World) -> None:
    for name, settings in MODELS.items():
        for form in FORMS:
            if (name, form) == ("softmax", "hybrid alone"):
                continue
            has_adapters = settings.lora_rank is not None
            wanted = HybridSettings(lora_alpha=HYBRID.lora_alpha) if has_adapters else HybridSettings()
            loaded = world.original(name, form, wanted)
            assert isinstance(loaded, Loaded), (name, form, loaded)
            assert loaded.model.hybrid.layers == settings.layers and not loaded.report.untrained
            expected = world.models[name] if form != "hybrid alone" else loaded.model
            assert torch.equal(loaded.flow, world.flow(expected)), (name, form)
            recorded = form not in PICKLES or PICKLES[form][1]
            assert loaded.model.trained_memory == (TrainedMemory(6, 3, 9) if recorded else None)


def test_random_damage_is_refused_or_changes_nothing(world: World) -> None:
    for seed in range(FAST_DRAWS):
        check(world, seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", [10_000, 20_000, 30_000])
def test_much_random_damage_is_refused_or_changes_nothing(world: World, first: int) -> None:
    for seed in range(first, first + SLOW_DRAWS):
        check(world, seed)
