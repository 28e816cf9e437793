"""Generate videos from prompts.

    python inference.py --config configs/causal_forcing_dmd_chunkwise.yaml --output_folder output/chunkwise \\
        --checkpoint_path checkpoints/chunkwise/causal_forcing.pt --data_path prompts/test.txt

Under torchrun the prompts are divided over the ranks; with --parallel video all ranks compute every video together.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging

from pipelines.cli import end_together, entry_point, rank_and_world_size
from pipelines.generation.arguments import inference_parser, plan_run
from pipelines.generation.run import generate, load_pipeline

log = logging.getLogger(__name__)


@end_together
@entry_point()
def main() -> int:
    """Parse, check, load, generate. Status 1 if some videos failed, 2 for bad input."""
    run = plan_run(inference_parser().parse_args())
    rank, world_size = rank_and_world_size()
    failed = generate(run, load_pipeline(run), rank, world_size)
    log.info("videos are in %s", run.output_folder)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
