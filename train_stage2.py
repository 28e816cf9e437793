"""Stage 2: the hybrid model learns, end to end, to predict what the frozen original predicts.

    python train_stage2.py --config configs/toyworld/stage2.yaml                              # one GPU or CPU
    torchrun --standalone --nproc_per_node 8 train_stage2.py --config configs/stage2.yaml [key=value …]

Started again, a run goes on where it was stopped.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from pipelines.cli import entry_point
from pipelines.training.config import Stage2Config
from pipelines.training.run import parse_config, train


@entry_point()
def main() -> int:
    """Parse, check, train. Status 2 for bad input and for a run that cannot go on, 1 for one that learned nothing."""
    train(parse_config(Stage2Config, __doc__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
