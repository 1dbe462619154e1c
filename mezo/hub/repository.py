"""Run logs on the Hugging Face hub: a repository with run.mezo, a model card, and no weights.

    push("runs/sst2/run.mezo", "user/sst2-opt")
    pull("user/sst2-opt")                          # a file in the hub's cache, checked

A log that somebody else wrote is data: it is checked when it is read, and nothing in it is run.
"""

import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mezo import trajectory
from mezo.errors import InputError
from mezo.foreign import hub_silence
from mezo.hub.card import card

LOG = "run.mezo"  # its name in a repository
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def push(
    log: str | Path, repo: str, *, private: bool = False, base_model: str | None = None
) -> dict[str, Any]:
    """Upload a run log and a model card made of it; create the repository if it does not exist.

    Args:
        private: whether a repository that this call creates is private.
        base_model: the base's name on the hub, for the card; None: the log's, if the hub has it.

    Return the repository's address and the base model. The token is huggingface_hub's: HF_TOKEN,
    or that of `hf auth login`. Anyone who may read the repository can read the log's config
    (`mezo log`), file names included. Raise InputError if the log is damaged or the hub refuses.
    """
    from huggingface_hub import HfApi

    found, api = trajectory.read(log), HfApi(library_name="mezo-lm")
    with _plainly(repo), tempfile.TemporaryDirectory(prefix="mezo-") as folder:
        if base_model is None:
            name = found.header["config"].get("model_name_or_path")
            known = isinstance(name, str) and _REPO.fullmatch(name) and not Path(name).exists()
            base_model = name if known and api.repo_exists(name) else None
        shutil.copyfile(log, Path(folder, LOG))
        text = card(Path(folder, LOG), repo, base_model)
        Path(folder, "README.md").write_text(text, encoding="utf-8")
        url = api.create_repo(repo, private=private or None, exist_ok=True)
        message = f"MeZO run of {len(found.steps)} steps"
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message)
    return {"repo": repo, "url": str(url), "base_model": base_model}


def pull(repo: str, output: str | Path | None = None) -> Path:
    """Download the run log of a repository and check it; copy it to `output`, if that is free.

    Raise InputError if there is no such repository, no run.mezo in it, or no network.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if output is not None and Path(output).exists():
        raise InputError(f"{output} exists")
    with _plainly(repo):
        here = isinstance(try_to_load_from_cache(repo, LOG), str)
        if (silence := hub_silence()) and not here:
            raise InputError(f"{repo}: {silence}, no copy here")
        alone = silence is not None
        found = hf_hub_download(repo, LOG, library_name="mezo-lm", local_files_only=alone)
        path = Path(found)
    trajectory.read(path)
    if output is None:
        return path
    try:
        return Path(shutil.copyfile(path, output))
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}") from None


def resolve(log: str | Path) -> Path:
    """Return the file of a run log: `log` itself, or what is pulled for
    "user/name" or "hub:user/name"."""
    name = str(log)
    if name.startswith("hub:"):
        return pull(name.removeprefix("hub:"))
    if Path(log).exists() or name.endswith(".mezo") or not _REPO.fullmatch(name):
        return Path(log)
    try:
        return pull(name)
    except InputError as error:
        raise InputError(f"{name} is not a file here; on the hub: {error}") from None


@contextmanager
def _plainly(repo: str) -> Iterator[None]:
    """Turn what the hub's client raises into InputErrors of one sentence."""
    from huggingface_hub import constants, errors

    login = "log in with: hf auth login"
    try:
        yield
    except errors.LocalEntryNotFoundError:
        raise InputError(f"{repo}: no answer from {constants.ENDPOINT}, no copy here") from None
    except errors.EntryNotFoundError:
        raise InputError(f"the repository {repo} has no {LOG}") from None
    except errors.GatedRepoError:
        raise InputError(f"the repository {repo} is gated: ask for access, and {login}") from None
    except errors.RepositoryNotFoundError:
        raise InputError(f"no repository {repo}, or none that you may see: {login}") from None
    except errors.HfHubHTTPError as error:
        code = error.response.status_code
        words = login if code in (401, 403) else str(error).splitlines()[0]
        raise InputError(f"{repo}: the hub answers {code}: {words}") from None
    except errors.OfflineModeIsEnabled:
        raise InputError(f"{repo}: HF_HUB_OFFLINE is set") from None
    except (errors.HTTPError, ConnectionError):
        raise InputError(f"{repo}: no answer from {constants.ENDPOINT}") from None
    except errors.HFValidationError:
        raise InputError(f"{repo!r} is not the name of a repository, user/name") from None
