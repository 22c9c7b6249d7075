//! What a pickle can describe: values without behaviour, and the list of names that it may mention.

use std::sync::Arc;

use crate::{checkpoint::element::Element, weights::Dtype};

/// The index of a value in [`Values`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Id(pub(super) u32);

/// One value. Values refer to each other by index, so a deep or circular pickle needs no recursion.
#[derive(Clone, Debug)]
pub(super) enum Value {
    None,
    Bool(bool),
    Int(i64),
    /// A number that no tensor needs: a float, or an integer of more than 64 bits.
    Number,
    Text(Box<str>),
    /// Bytes, which no tensor needs.
    Bytes,
    Tuple(Vec<Id>),
    /// A list or a set.
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// One of the names of [`allowed`].
    Global(Global),
    Storage(Storage),
    Tensor(Tensor),
    /// Something whose class is harmless and whose contents are only looked at for tensors of a TorchScript module.
    Object {
        state: Option<Id>,
    },
}

/// A run of elements in the file.
#[derive(Clone, Debug)]
pub(super) struct Storage {
    /// Its name in the file.
    pub key: Arc<str>,
    /// The elements, or none if they are bytes whose type the tensor says.
    pub element: Option<Element>,
    /// The first element, for old files in which a storage is a part of another one.
    pub first: usize,
    /// The number of elements.
    pub count: usize,
}

/// A view of a storage.
#[derive(Clone, Debug)]
pub(super) struct Tensor {
    pub storage: Storage,
    pub element: Element,
    /// The offset in the storage, in elements.
    pub offset: usize,
    pub shape: Vec<usize>,
    pub strides: Vec<usize>,
}

/// What a global of the allow-list makes.
#[derive(Clone, Debug)]
pub(super) enum Global {
    /// The type of a storage, with its elements unless it is one of bytes.
    Storage(Option<Element>),
    Dtype(Element),
    /// `_rebuild_tensor`, `_rebuild_tensor_v2` and `_v3`, whose first four arguments are alike.
    RebuildTensor,
    /// `_rebuild_parameter` and `_rebuild_parameter_with_state`, whose first argument is the tensor.
    RebuildParameter,
    /// `_rebuild_from_type_v2`: a function, a class, and the function's arguments.
    RebuildFromType,
    /// A class of dictionaries.
    Dict,
    /// A class of lists or sets.
    List,
    /// A class or function that is not called; its result is an empty object.
    Inert,
}

/// The values of a pickle.
#[derive(Debug, Default)]
pub(super) struct Values(pub(super) Vec<Value>);

impl Values {
    pub(super) fn get(&self, id: Id) -> &Value {
        usize::try_from(id.0).ok().and_then(|at| self.0.get(at)).unwrap_or(&Value::None)
    }

    pub(super) fn text(&self, id: Id) -> Option<&str> {
        match self.get(id) {
            Value::Text(text) => Some(text),
            _ => None,
        }
    }
}

/// Classes of settings that trainers store beside the weights. They are not made; their contents are ignored.
const INERT: &[&str] = &[
    // the standard library and numpy
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.slice",
    "__builtin__.bytearray",
    "__builtin__.complex",
    "__builtin__.slice",
    "datetime.date",
    "datetime.datetime",
    "datetime.timedelta",
    "decimal.Decimal",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    "numpy.ndarray",
    "pathlib.Path",
    "pathlib.PosixPath",
    "pathlib.PurePath",
    "pathlib.PurePosixPath",
    "pathlib.PureWindowsPath",
    "pathlib.WindowsPath",
    "pathlib._local.PosixPath",
    "pathlib._local.WindowsPath",
    "types.SimpleNamespace",
    "uuid.UUID",
    // PyTorch
    "torch.Tensor",
    "torch.device",
    "torch.nn.parameter.Parameter",
    "torch.nn.parameter.Buffer",
    "torch.serialization._get_layout",
    // settings of Lightning, omegaconf and yacs
    "lightning.fabric.utilities.data.AttributeDict",
    "lightning_fabric.utilities.data.AttributeDict",
    "omegaconf.base.ContainerMetadata",
    "omegaconf.base.Metadata",
    "omegaconf.dictconfig.DictConfig",
    "omegaconf.listconfig.ListConfig",
    "omegaconf.nodes.AnyNode",
    "omegaconf.nodes.BooleanNode",
    "omegaconf.nodes.FloatNode",
    "omegaconf.nodes.IntegerNode",
    "omegaconf.nodes.StringNode",
    "pytorch_lightning.utilities.parsing.AttributeDict",
    "typing.Any",
    "yacs.config.CfgNode",
];

/// Looks a global up in the allow-list. `script` allows the classes that a TorchScript archive itself defines.
pub(super) fn allowed(module: &str, name: &str, script: bool) -> Option<Global> {
    let full = format!("{module}.{name}");
    if module == "torch" || module == "torch.cuda" {
        if let Some(element) = name.strip_suffix("Storage").and_then(storage_type) {
            return Some(Global::Storage(Some(element)));
        }
        if let Some(element) = dtype(name) {
            return Some(Global::Dtype(element));
        }
    }
    Some(match full.as_str() {
        "torch.storage.UntypedStorage" | "torch.UntypedStorage" => Global::Storage(None),
        "torch._utils._rebuild_tensor" | "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor_v3" => {
            Global::RebuildTensor
        }
        "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state" => Global::RebuildParameter,
        "torch._tensor._rebuild_from_type_v2" => Global::RebuildFromType,
        "collections.OrderedDict"
        | "collections.defaultdict"
        | "collections.Counter"
        | "builtins.dict"
        | "__builtin__.dict" => Global::Dict,
        "builtins.set"
        | "builtins.frozenset"
        | "builtins.list"
        | "builtins.tuple"
        | "__builtin__.set"
        | "__builtin__.frozenset"
        | "__builtin__.list"
        | "__builtin__.tuple"
        | "collections.deque"
        | "torch.Size" => Global::List,
        // what `defaultdict` makes of a missing key
        "builtins.int" | "builtins.float" | "builtins.str" | "builtins.bool" | "__builtin__.int"
        | "__builtin__.float" | "__builtin__.str" | "__builtin__.bool" => Global::Inert,
        _ if INERT.contains(&full.as_str()) => Global::Inert,
        _ if script && (module == "__torch__" || module.starts_with("__torch__.") || module == "torch.jit._pickle") => {
            Global::Inert
        }
        // numpy's types, as `numpy.dtypes.Float32DType`
        _ if module == "numpy.dtypes" && name.ends_with("DType") => Global::Inert,
        _ => return None,
    })
}

/// The elements of `torch.FloatStorage` and so on.
fn storage_type(name: &str) -> Option<Element> {
    Some(match name {
        "Float" => Element::Float(Dtype::F32),
        "Half" => Element::Float(Dtype::F16),
        "BFloat16" => Element::Float(Dtype::Bf16),
        "Double" => Element::Float(Dtype::F64),
        "Byte" | "Char" | "Bool" => Element::Other(1),
        "Short" => Element::Other(2),
        "Int" => Element::Other(4),
        "Long" | "ComplexFloat" => Element::Other(8),
        "ComplexDouble" => Element::Other(16),
        _ => return None,
    })
}

/// The elements of `torch.float32` and so on.
fn dtype(name: &str) -> Option<Element> {
    Some(match name {
        "float32" | "float" => Element::Float(Dtype::F32),
        "float16" | "half" => Element::Float(Dtype::F16),
        "bfloat16" => Element::Float(Dtype::Bf16),
        "float64" | "double" => Element::Float(Dtype::F64),
        "float8_e4m3fn" => Element::E4m3,
        "float8_e5m2" => Element::E5m2,
        "uint8" | "int8" | "bool" | "float8_e4m3fnuz" | "float8_e5m2fnuz" | "float8_e8m0fnu" => Element::Other(1),
        "int16" | "uint16" | "short" => Element::Other(2),
        "int32" | "uint32" | "int" => Element::Other(4),
        "int64" | "uint64" | "long" | "complex64" => Element::Other(8),
        "complex128" => Element::Other(16),
        _ => return None,
    })
}
