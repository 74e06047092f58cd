"""With what a result was made: commit of this code, lock file, versions. None of it enters an id. No JAX here."""

import functools
import hashlib
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@functools.cache
def software() -> dict[str, str]:
    """commit, lock (first digits of the SHA-256 of requirements.lock, where there is one), python, and PACKAGES."""
    source = {"commit": commit()}
    if (ROOT / "requirements.lock").is_file():
        source["lock"] = digest((ROOT / "requirements.lock").read_bytes())
    versions = {package: version(package) for package in PACKAGES}
    return source | {"python": platform.python_version()} | {k: v for k, v in versions.items() if v}


def commit() -> str:
    """The commit of the git checkout that this code lies in, with "+changes" where tracked files differ from it; else
    what pip knows of the installed package: the commit it was built from, or "version X".
    """
    if (ROOT / ".git").exists():
        try:
            head = git("rev-parse", "HEAD").strip()
            return head[:12] + ("+changes" if git("status", "--porcelain", "--untracked-files=no").strip() else "")
        except (OSError, subprocess.SubprocessError):  # no git here, or a checkout of another user
            pass
    try:
        installed = metadata.distribution("scaling-laws")
    except metadata.PackageNotFoundError:
        return "unknown"
    origin = json.loads(installed.read_text("direct_url.json") or "{}")
    return str(origin.get("vcs_info", {}).get("commit_id", ""))[:12] or f"version {installed.version}"


def git(*arguments: str) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("GIT_")}
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=20).stdout


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
