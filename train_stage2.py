"""Stage 2: the hybrid model learns, end to end, to predict what the frozen original predicts.

    python train_stage2.py --config configs/toyworld/stage2.yaml                              # one GPU or CPU
    torchrun --standalone --nproc_per_node 8 train_stage2.py --config configs/stage2.yaml [key=value …]

Started again, a run goes on where it was stopped.
"""

from pipelines.cli import entry_point
from wan.utils.signals import check_interrupted


@entry_point()
def main() -> int:
    """Parse, check, train. Status 2 for bad input and for a run that cannot go on, 1 for one that learned nothing."""
    # Here, so that Ctrl-C is answered in one line while they load.
    from pipelines.training.config import Stage2Config
    from pipelines.training.run import parse_config, train

    check_interrupted()
    train(parse_config(Stage2Config, __doc__))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
