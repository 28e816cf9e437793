"""Sessions of a pipeline: begun, and loaded from files."""

from pathlib import Path
from typing import Unpack

import torch

from pipelines.generation.decoding import Phase, no_phase
from pipelines.generation.inputs.request import CallArguments, Prompts, Stored
from pipelines.generation.inputs.schedule import Schedule
from pipelines.generation.mixins.making import MakingMixin
from pipelines.generation.sessions.files import does_not_fit, read_session
from pipelines.generation.sessions.session import Session
from wan.utils.errors import InputError


class SessionMixin(MakingMixin):
    """Adds videos that are generated block by block, on request."""

    @torch.no_grad()
    def session(
        self,
        prompt: Prompts | Schedule | None = None,
        num_frames: int | Stored | None = None,
        height: int | None = None,
        width: int | None = None,
        *,
        phase: Phase = no_phase,
        **arguments: Unpack[CallArguments],
    ) -> Session:
        """Begin a video whose blocks are generated on request, to be steered, saved and divided between them.

        Arguments are those of `CausalVideoPipeline.stream`.

        Args:
            num_frames: frames of the video; None to go on as long as it is asked for (give `memory` a window then).

        Raises:
            InputError: arguments that do not fit, before anything is computed; or processes compute videos together.
        """
        self._require_alone()
        plan = self.plan(prompt, num_frames, height, width, **arguments)
        self.ready()
        return Session.start(self, plan, phase)

    @torch.no_grad()
    def load_session(self, path: str | Path) -> Session:
        """Go on with a session that `Session.save` has written, on this machine or another.

        On the same kind of device, with the same PyTorch, it goes on to the same frames, on a CPU bit for bit; what
        differs is warned of. No code in the file is run, and nothing in it is trusted.

        Raises:
            CheckpointError: the file is missing, damaged, of another version, or does not fit this pipeline: other
                weights, VAE, text encoder, types or settings.
            InputError: processes compute videos together.
        """
        self._require_alone()
        self.ready()
        plan, facts, snapshot, spec = read_session(Path(path), self)
        try:
            return Session.resume(self, plan, facts, snapshot, spec)
        except InputError as error:
            raise does_not_fit(Path(path), error) from error

    def _require_alone(self) -> None:
        if self._parallel is not None:
            raise InputError("a session is of one process: leave parallelize out, or use stream")
