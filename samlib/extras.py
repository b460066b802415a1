"""What needs more than PyTorch and NumPy says which extra brings it."""

from __future__ import annotations

__all__ = ["EXTRAS", "remedy"]

# Which extra brings a module that may be missing.
EXTRAS = {
    **dict.fromkeys(("pydantic", "pydantic_core", "typer", "pandas", "pyarrow", "yaml", "filelock", "joblib"), "lab"),
    **dict.fromkeys(("tqdm", "sklearn", "requests", "torchvision", "matplotlib", "seaborn", "IPython"), "lab"),
    **dict.fromkeys(("papermill", "nbformat", "nbconvert", "ipykernel", "rich"), "sweep"),
    **dict.fromkeys(("jupyter_book", "sphinx", "bs4", "altair", "vl_convert", "playwright"), "book"),
    "rdkit": "molecules",
    "ray": "ray",
}


def remedy(error: ModuleNotFoundError, what: str) -> str:
    """What to do about a missing module.

    >>> remedy(ModuleNotFoundError(name="papermill"), "samlib sweep")
    "samlib sweep needs papermill, which the extra 'sweep' brings: pip install 'samlib[sweep]'"
    """
    module = (error.name or "").partition(".")[0]
    if module not in EXTRAS:
        return f"{what} needs {module}, which is not installed"
    extra = EXTRAS[module]
    return f"{what} needs {module}, which the extra {extra!r} brings: pip install 'samlib[{extra}]'"
