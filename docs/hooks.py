"""What MkDocs is told beside `mkdocs.yml`: the site has the repository's layout.

Pages and figures keep the repository's paths, also those from outside of `docs/`. So a relative link leads to the same
place on GitHub and on the site, and MkDocs checks it.
"""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

BESIDE = ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md", "benchmarks/figures/*.png"]
"""Pages and figures outside of `docs/`, as patterns."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Give the files of `docs/` their paths in the repository, and add those from beside it."""
    root = Path(config.config_file_path).parent
    ours = [file for file in files if file.src_dir == config.docs_dir]
    paths = [Path(config.docs_dir, file.src_path) for file in ours if not file.src_path.endswith(".py")]
    paths += [path for pattern in BESIDE for path in sorted(root.glob(pattern))]
    for file in ours:
        files.remove(file)
    for path in paths:
        name = path.relative_to(root).as_posix()
        files.append(File(name, str(root), config.site_dir, config.use_directory_urls))
    return files
