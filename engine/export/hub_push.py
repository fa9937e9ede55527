"""Push an adapter to the Hugging Face hub: adapter, its config, tokenizer and model card, in one commit.

What is pushed is a fresh export in the form `peft`. Nothing else of the adapter's folder leaves this
machine: its train_config.json names data, and the card of a sweep's best/ quotes two samples. The
token is huggingface_hub's own (`hf auth login`, or HF_TOKEN), never a config's or an argument's.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from engine.adapter.peft_files import CONFIG, TRAIN_CONFIG, WEIGHTS
from engine.config.trial import TrainConfig
from engine.errors import InputError, first_line
from engine.export.forms import TOKENIZER_FILES, export
from engine.export.model_card import Measured, is_local
from engine.system.command_line import tell
from engine.system.files import home_folder

CARD = "README.md"
OWN_FILES = (WEIGHTS, CONFIG, CARD, TRAIN_CONFIG)  # beside the tokenizer's
REPO_FIELD = "--repo"


def push(
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    base_name: str | None = None,
    config: TrainConfig | None = None,
    measure: bool = True,
    trust_remote_code: bool = False,
) -> tuple[str, Measured | None]:
    """Push `folder`'s adapter to the model repository `repo` and return its address and the losses.

    public: a new repository is private unless this is set. base_name: hub id of the base model, for
    one that is a folder here. config, measure, trust_remote_code: as in `export`. Raises InputError,
    before anything is computed, for a folder with other files or without an adapter, a bad name, no
    token, or a repository that may not be written or is public and was to be private.
    """
    _refuse_foreign(folder)
    if base_name is not None and not is_local(base_name):
        _require_hub_id("--base-model", base_name)
    api = _api(repo)
    is_new = _is_new(api, repo, public)
    with tempfile.TemporaryDirectory() as place:
        out = Path(place) / "adapter"

        def check(base: str) -> str:
            if is_local(base_name or base):
                allowed = "is a folder of this machine, where nobody else finds it; add --base-model with its hub id"
                raise InputError("base_model_name_or_path", base_name or base, allowed)
            return base_name or base

        measured = export(
            folder, "peft", out, config=config, measure=measure, trust_remote_code=trust_remote_code, rename_base=check
        )
        (out / TRAIN_CONFIG).unlink(missing_ok=True)
        _refuse_machine_paths(out, folder)
        tell(f"pushing to {repo}")
        address = _hub(repo, lambda: _upload(api, repo, out, None if not is_new else not public))
    return address, measured


def _refuse_foreign(folder: Path) -> None:
    """Refuse a folder that holds anything but an adapter: nobody should guess what was published."""
    if not folder.is_dir():
        raise InputError("adapter", str(folder), f"must be a folder with {CONFIG} and {WEIGHTS}")
    for path in sorted(folder.iterdir()):
        known = path.name in OWN_FILES or any(path.match(pattern) for pattern in (*TOKENIZER_FILES, "additional_chat_templates"))
        if path.is_symlink() or not known:
            what = "is a link" if path.is_symlink() else "is no part of an adapter"
            raise InputError("adapter", str(path), f"{what}; push the folder that holds the adapter alone")


def _api(repo: str) -> Any:
    from huggingface_hub import HfApi, constants, get_token

    _require_hub_id(REPO_FIELD, repo)
    if "/" not in repo:
        raise InputError(REPO_FIELD, repo, "must be organisation/name, or your user name before the /")
    if constants.is_offline_mode():
        raise InputError(REPO_FIELD, repo, "cannot be reached while HF_HUB_OFFLINE is set; unset it to push")
    token = get_token()
    if token is None:
        raise InputError(REPO_FIELD, repo, "needs a token that may write: run `hf auth login`, or set HF_TOKEN")
    return HfApi(token=token)


def _require_hub_id(field: str, name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(field, name, f"must be organisation/name ({first_line(error)})") from None


def _is_new(api: Any, repo: str, public: bool) -> bool:
    """Return whether the repository has yet to be made. Raises InputError for one that is public unasked."""
    from huggingface_hub.errors import RepositoryNotFoundError

    _hub(repo, api.whoami)  # the hub says 401 for a repository that does not exist, too
    try:
        found = _hub(repo, lambda: api.repo_info(repo, repo_type="model"), RepositoryNotFoundError)
    except RepositoryNotFoundError:
        return True
    if not found.private and not public:
        raise InputError(REPO_FIELD, repo, "exists and is public: --public pushes there, another name makes a private one")
    return False


def _upload(api: Any, repo: str, out: Path, private: bool | None) -> str:
    """Write all files in one commit, so that nobody loads half of them. private: None for a repository that exists."""
    from huggingface_hub import CommitOperationAdd

    if private is not None:
        api.create_repo(repo, private=private, repo_type="model")
    files = [path for path in sorted(out.rglob("*")) if path.is_file()]
    operations = [CommitOperationAdd(str(path.relative_to(out)), path.read_bytes()) for path in files]
    api.create_commit(repo, operations, commit_message="Add the adapter", repo_type="model")
    return f"{api.endpoint}/{repo}"


def _hub(repo: str, ask: Callable[[], Any], *passed: type[Exception]) -> Any:
    """Return the hub's answer. Its refusals, and a network that fails, are one line; errors in `passed` are not caught."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return ask()
    except passed:
        raise
    except (HfHubHTTPError, OSError) as error:
        said = getattr(error, "server_message", None) or first_line(error)
        raise InputError(REPO_FIELD, repo, f"was refused by the hub, or it cannot be reached ({said})") from None
    except Exception as error:
        if not type(error).__module__.startswith("http"):  # httpx raises errors of its own for a network that fails
            raise
        raise InputError(REPO_FIELD, repo, f"cannot be reached ({first_line(error)})") from None


def _refuse_machine_paths(out: Path, folder: Path) -> None:
    """Raise InputError if a file for people or loaders names a place on this machine."""
    own = {str(place) for place in (home_folder(), folder.absolute().parent, Path.cwd()) if place and len(place.parts) > 2}
    for path in sorted(out.rglob("*")):
        if path.name in (CONFIG, CARD, "tokenizer_config.json", "special_tokens_map.json"):
            text = path.read_text(encoding="utf-8")
            values = _texts(json.loads(text)) if path.suffix == ".json" else ()
            odd = next((place for place in own if place in text), None) or next((v for v in values if _is_path(v)), None)
            if odd is not None:
                raise InputError(path.name, odd, "is a place on this machine, and would be published; change it in the folder")


def _is_path(value: str) -> bool:
    return len(Path(value).parts) > 2 and not any(char.isspace() for char in value) and is_local(value)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(part)
