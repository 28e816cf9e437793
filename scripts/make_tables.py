"""Make the paper's tables from files of results.

    python scripts/make_tables.py output/bench/benchmark.json --format md --output_file tables.md
    python scripts/make_tables.py softmax=a/scores.json hybrid=b/scores.json --table quality drift --format latex
    python scripts/make_tables.py full=full.json no_gate=no_gate.json --table ablations --format csv

Files are JSON of scripts/benchmark.py (tables efficiency and memory), scripts/evaluate.py (quality, drift, ablations)
and scripts/probe_memory.py (recall), and the YAML of scripts/select_layers.py (layers). Every measured cell names the
file that it comes from; published figures of others stand below and are marked. What was not measured says why.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
import sys
from pathlib import Path

from pipelines.cli import entry_point
from pipelines.evaluation.tables.build import TABLES, make_tables
from pipelines.evaluation.tables.formats import Format, relative_link, written
from pipelines.evaluation.tables.pictures import write_pictures
from pipelines.evaluation.tables.sources import read_sources
from pipelines.flags import Parser, as_path
from wan.utils.files import atomic_path, check_target

log = logging.getLogger(__name__)


def tables_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="[LABEL=]FILE", help="files of results")
    add("--table", nargs="+", choices=tuple(TABLES), default=[], help="by default all that the files allow")
    add("--format", choices=[form.value for form in Format], default="md", help="md (default), latex or csv")
    sheet = "frames of the first prompts, a row per model, from the folders that scores name"
    add("--pictures", type=as_path, metavar="PATH", help=sheet)
    add("--output_file", type=as_path, metavar="PATH", help="by default the terminal; links are relative to it")
    return parser


@entry_point()
def main() -> int:
    """Parse, read, write."""
    arguments = tables_parser().parse_args()
    for target in filter(None, (arguments.output_file, arguments.pictures)):
        check_target(target)
    folder = Path.cwd() if arguments.output_file is None else arguments.output_file.parent
    sources, form = read_sources(arguments.runs), Format(arguments.format)
    text = written(make_tables(sources, arguments.table), form, folder)
    if arguments.pictures is not None:
        shown = write_pictures(sources, arguments.pictures)
        log.info("frames of %d prompts are in %s", shown, arguments.pictures)
        if form is Format.MARKDOWN:
            text += f"\n![frames by model](<{relative_link(arguments.pictures, folder)}>)\n"
    if arguments.output_file is None:
        sys.stdout.write(text)
        return 0
    with atomic_path(arguments.output_file) as temporary:
        temporary.write_text(text)
    log.info("the tables are in %s", arguments.output_file)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
