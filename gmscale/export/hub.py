"""Uploading an exported folder to the Hugging Face hub, or to what HF_ENDPOINT names."""

import os
from pathlib import Path

from gmscale.errors import RunError, UsageError
from gmscale.export.timm_files import FILES


def push(folder: Path, repository: str, *, private: bool = False) -> str:
    """Upload the files of an exported folder to the model repository OWNER/NAME, and return its address.

    The repository is made if it is missing, `private` or as its owner's settings say. The token is HF_TOKEN's or
    the one that `hf auth login` saved. UsageError without one, RunError if the hub refuses or cannot be reached.
    """
    try:
        from huggingface_hub import HfApi, get_token
    except ImportError:
        raise UsageError('--push needs huggingface_hub; pip install "gmscale[export]"') from None
    if get_token() is None:
        raise UsageError(f"--push {repository} needs a token: set HF_TOKEN, or run hf auth login; {folder} stays")
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="gmscale")
    try:
        made = api.create_repo(repository, private=private or None, exist_ok=True)
        if made.repo_type not in (None, "model"):
            raise RunError(f"{made} is a {made.repo_type}, not a model")
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Upload a model exported by gmscale",
        )
    except Exception as error:  # also those of the HTTP library that the client happens to use
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise RunError(f"--push {repository} failed: {reason}; {folder} stays") from error
    return str(made)
