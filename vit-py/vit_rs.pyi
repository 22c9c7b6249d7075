"""Vision Transformers that classify and embed images, without PyTorch."""

from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, Literal, Protocol, TypeAlias, TypeVar, final, overload

import numpy as np
from numpy.typing import NDArray

__version__: str

class _Picture(Protocol):
    """A PIL.Image.Image."""

    @property
    def mode(self) -> str: ...
    def convert(self, mode: Any = ..., /) -> Any: ...

class _ArrowArray(Protocol):
    def __arrow_c_array__(self, requested_schema: Any = None) -> Any: ...

class _ArrowStream(Protocol):
    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any: ...

#: A path, an encoded file in memory, pixels [H, W, 3], or a picture of PIL.
Image: TypeAlias = str | PathLike[str] | bytes | bytearray | memoryview | NDArray[np.uint8] | _Picture
#: Images, or an array [N, H, W, 3].
Images: TypeAlias = Iterable[Image] | NDArray[np.uint8]
Errors: TypeAlias = Literal["raise", "return"]
_Batch = TypeVar("_Batch", bound=_ArrowArray | _ArrowStream)

@final
class Prediction:
    """One class of an answer."""

    @property
    def label(self) -> str:
        """The class's name, or its number if the model has no names."""
    @property
    def index(self) -> int:
        """The number of the class."""
    @property
    def probability(self) -> float:
        """The probability, between 0 and 1."""

@final
class Model:
    """A model that answers for images. Several threads may use one; it pickles as its name and its options."""

    def __new__(
        cls,
        model: str | PathLike[str],
        *,
        precision: Literal["auto", "f32", "bf16x3", "bf16", "int8", "f16"] = "auto",
        threads: int | None = None,
        device: str = "auto",
        exif: bool = True,
    ) -> Model: ...
    @overload
    def embed(
        self, images: Images, *, normalize: bool = False, batch: int = 8, errors: Literal["raise"] = "raise"
    ) -> NDArray[np.float32]: ...
    @overload
    def embed(
        self, images: Images, *, normalize: bool = False, batch: int = 8, errors: Literal["return"]
    ) -> tuple[NDArray[np.float32], list[str | None]]:
        """Turns images into vectors [N, D]. With errors="return", a bad image has a row of NaN and a text."""
    @overload
    def classify(
        self, images: Images, k: int = 5, *, batch: int = 8, errors: Literal["raise"] = "raise"
    ) -> list[list[Prediction]]: ...
    @overload
    def classify(
        self, images: Images, k: int = 5, *, batch: int = 8, errors: Literal["return"]
    ) -> list[list[Prediction] | ImageError]:
        """Gives the k most probable classes of each image, the most probable first."""
    def attention(self, image: Image, *, block: int | None = None, head: int | None = None) -> NDArray[np.float32]:
        """Gives what the answer takes from each patch, [rows, columns]."""
    def embed_arrow(
        self, batch: _Batch, column: str = "image", *, normalize: bool = False, model_batch: int = 8
    ) -> _Batch:
        """Adds the columns `embedding` and `error` to a batch. Types of pyarrow stay pyarrow's."""
    @property
    def dim(self) -> int:
        """The number of values of a vector."""
    @property
    def labels(self) -> Sequence[str] | None:
        """The names of the classes, or None."""
    @property
    def info(self) -> dict[str, Any]:
        """The document of the model: architecture, preprocessing, origin."""
    @property
    def kernel(self) -> str:
        """What runs the model."""
    @property
    def precision(self) -> str:
        """The precision that runs."""
    @property
    def threads(self) -> int:
        """The CPU threads of the model."""

def convert(
    input: str | PathLike[str],
    output: str | PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    preprocess: str | None = None,
    img_size: tuple[int, int] | None = None,
    verify: bool = True,
) -> list[str]:
    """Converts an ONNX file, and returns what was assumed. Nothing is written unless the result agrees with the graph."""

class Error(Exception):
    """What every exception of this module is."""

class ImageError(Error):
    """An image cannot be read, decoded or preprocessed."""

class InputError(Error):
    """An argument that does not fit the model."""

class ModelError(Error):
    """A model cannot be found, read or converted, or answers values that are not finite."""

class HubError(Error):
    """The Hugging Face Hub, or the connection to it."""

class UnsupportedError(Error):
    """What this build, this machine or this model cannot do."""
