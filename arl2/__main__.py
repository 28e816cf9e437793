"""The command `arl2` by the name of its package: `python -m arl2 generate …`, `torchrun … -m arl2 train-stage2 …`."""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from pipelines.console.run import main

if __name__ == "__main__":
    raise SystemExit(main())
