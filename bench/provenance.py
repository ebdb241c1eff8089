"""What made a figure: the commit of this checkout and the compiler of its kernels."""

from __future__ import annotations

import subprocess
from pathlib import Path

from recemb.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
# What the benchmarks write is no change of what they measure.
_SOURCES = (".", ":(exclude)bench/results")


def git(folder: Path, *words: str, hint: str = "") -> str:
    """What a git command prints.

    Args:
        folder: where it runs.
        words: the command.
        hint: names the user's flag in the error; by default the command itself.

    Raises:
        ConfigError: it fails, or there is no git.
    """
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
    except OSError as error:
        raise ConfigError(f"{hint or 'git ' + words[0]}: git does not run: {error.strerror}") from error
    if done.returncode:
        said = done.stderr.strip().splitlines()
        raise ConfigError(
            f"{hint or 'git ' + words[0]}: {said[-1] if said else 'no such commit; see git log --oneline'}"
        )
    return done.stdout


def resolve(ref: str, root: Path = ROOT) -> str:
    """The short hash of a commit, tag or branch.

    Raises:
        ConfigError: no such commit, or ``root`` is no git checkout.
    """
    return git(
        root, "rev-parse", "--verify", "--quiet", "--short", f"{ref}^{{commit}}", hint=f"--base {ref}"
    ).strip()


def head_commit(root: Path = ROOT) -> str:
    """The short hash of the commit checked out, with ``+`` when files differ from it; empty without one."""
    # A folder within another project's checkout is not that project's commit.
    if not (root / ".git").exists():
        return ""
    try:
        changed = git(root, "status", "--porcelain", "--", *_SOURCES)
        return resolve("HEAD", root) + ("+" if changed else "")
    except ConfigError:
        return ""


def compiler_version() -> str:
    """The first line of the compiler's ``--version``; ``none`` without one that kernels can take."""
    # An older commit that is compared with may have other names for these.
    from recemb_kernels.build import KernelUnavailableError, _compiler_version, compiler

    try:
        return _compiler_version(compiler())
    except KernelUnavailableError:
        return "none"
