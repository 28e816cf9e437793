"""Fetch public prompt suites for scripts/sample_suite.py: a few hundred kB of text, from where their authors keep it.

    python scripts/download_suites.py --suite vbench moviegen

Every file is checked before it gets its name: its size, that it is what its suite reads, and how many prompts it holds.
source.json beside them says where they came from, with hashes. Files that are there and whole are kept; --again fetches
them anew. Prompts keep the licences of their authors (docs/evaluation.md). LongLive's interactive prompts cannot be
released (issue 22 of NVlabs/LongLive); `--suite interactive` of sample_suite.py takes our own.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import hashlib
import http.client
import logging
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipelines.cli import entry_point
from pipelines.evaluation.suite_files import KNOWN, num_listed, read_suite, read_suite_file, with_extended
from pipelines.evaluation.suites import Suite
from pipelines.flags import Parser, as_path
from wan.utils.errors import InputError
from wan.utils.files import atomic_folder, check_writable, write_json
from wan.utils.signals import check_interrupted

log = logging.getLogger(__name__)

ENDPOINT = "https://raw.githubusercontent.com"
MAX_BYTES = 8 * 2**20
"""The largest of these files has about 1 MB."""
TIMEOUT_SECONDS = 30.0
CHUNK = 2**16
ATTEMPTS = 3
PAUSE_SECONDS = 1.0


@dataclass(frozen=True)
class SuiteSource:
    """Where a suite lies.

    Attributes:
        files: by the name that it gets, the path of a file at the endpoint: repository, branch, path.
        licence: as far as its authors state one.
    """

    files: dict[str, str]
    licence: str


SELF_FORCING = "guandeh17/Self-Forcing/main/prompts"
SOURCES = {
    "vbench": SuiteSource(
        {
            "VBench_full_info.json": "Vchitect/VBench/master/vbench/VBench_full_info.json",
            "all_dimension.txt": "Vchitect/VBench/master/prompts/all_dimension.txt",
            # Named by its authors as that of their scores: issue 19 of guandeh17/Self-Forcing.
            "all_dimension_extended.txt": f"{SELF_FORCING}/vbench/all_dimension_extended.txt",
        },
        "VBench: Apache-2.0; extended prompts: none stated beside them",
    ),
    "moviegen": SuiteSource(
        {
            "MovieGenVideoBench.txt": "facebookresearch/MovieGenBench/main/benchmark/MovieGenVideoBench.txt",
            "MovieGenVideoBench_extended.txt": f"{SELF_FORCING}/MovieGenVideoBench_extended.txt",
        },
        "MovieGenBench: CC BY-NC; extended prompts: none stated beside them",
    ),
}
"""What --suite takes. VBench-Long has VBench's prompts."""


def fetch(url: str) -> bytes:
    """The content at an address; tried again where a connection fails.

    Raises:
        InputError: it cannot be reached, is not there, or is too large.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _read(url)
        except InputError:
            raise
        except urllib.error.HTTPError as error:
            if error.code < 500 or attempt == ATTEMPTS:
                raise InputError(
                    f"{url} answers {error.code} {error.reason}: the file may have moved; look there, put it into the "
                    "folder by hand, or give --endpoint"
                ) from error
        except (OSError, http.client.HTTPException, ValueError) as error:
            if attempt == ATTEMPTS:
                reason = str(error) or type(error).__name__
                raise InputError(
                    f"cannot fetch {url} ({reason}): check the network; without one, fetch the file elsewhere and put "
                    "it into the folder by hand"
                ) from error
        time.sleep(PAUSE_SECONDS * attempt)
    raise AssertionError("the last attempt returns or raises")


def _read(url: str) -> bytes:
    if not url.startswith(("http://", "https://")):
        raise InputError(f"{url} is no address of the web: give an --endpoint that begins with https://")
    content = bytearray()
    with urllib.request.urlopen(url, timeout=TIMEOUT_SECONDS) as answer:
        wanted = int(answer.headers.get("Content-Length") or -1)
        while len(content) <= MAX_BYTES and (chunk := answer.read(CHUNK)):
            content += chunk
            check_interrupted()
    if len(content) > MAX_BYTES:
        raise InputError(f"{url} is larger than {MAX_BYTES >> 20} MiB, which is no list of prompts: look there")
    if wanted not in (-1, len(content)):
        raise ConnectionError(f"the connection ended after {len(content)} of {wanted} bytes")
    return bytes(content)


def checked(name: str, folder: Path) -> Suite:
    """The suite of a folder.

    Raises:
        InputError: a file is missing, damaged, does not fit the others, or holds another number of prompts.
    """
    known = KNOWN[name]
    path = folder / known.file
    suite = read_suite_file(path, repeats=True)
    listed = num_listed(path)
    if known.count is not None and listed != known.count:
        raise InputError(
            f"{path} lists {listed} prompts, {name} has {known.count}: it is another version; look where it came from "
            "and take one that has as many"
        )
    if known.extended is not None:
        keys = path if known.keys is None else folder / known.keys
        suite = with_extended(suite, folder / known.extended, keys)
    return suite


def download(name: str, folder: Path, endpoint: str) -> Suite:
    """Fetch a suite; its folder appears when all of it is there and right.

    Args:
        folder: the one for all suites.

    Raises:
        InputError: see `fetch` and `checked`; what was there before stays.
    """
    source = SOURCES[name]
    with atomic_folder(folder / name) as target:
        page = {}
        for file, path in source.files.items():
            url = f"{endpoint.rstrip('/')}/{path}"
            content = fetch(url)
            (target / file).write_bytes(content)
            page[file] = {"url": url, "sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        suite = checked(name, target)
        write_json(target / "source.json", {"licence": source.licence, "files": page})
    return suite


@entry_point()
def main() -> int:
    """Parse, fetch, check, report."""
    parser = Parser(__doc__)
    parser.add_argument(
        "--suite", choices=list(SOURCES), nargs="+", default=list(SOURCES), help="which; by default all"
    )
    where = "below which every suite has a folder (default data/suites)"
    parser.add_argument("--output_folder", type=as_path, default=Path("data/suites"), metavar="PATH", help=where)
    parser.add_argument("--endpoint", default=ENDPOINT, help=f"a mirror with the same paths (default {ENDPOINT})")
    parser.add_argument("--again", action="store_true", help="fetch also what is there")
    arguments = parser.parse_args()
    check_writable(arguments.output_folder)
    for name in arguments.suite:
        if (arguments.output_folder / name).exists() and not arguments.again:
            checked(name, arguments.output_folder / name)
        else:
            download(name, arguments.output_folder, arguments.endpoint)
        suite = read_suite(name, arguments.output_folder)
        Console(soft_wrap=True, highlight=False).print(
            f"{name}: {len(suite.entries)} prompts, {suite.num_videos} videos; {SOURCES[name].licence}; in "
            f"{arguments.output_folder / name}",
            markup=False,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
