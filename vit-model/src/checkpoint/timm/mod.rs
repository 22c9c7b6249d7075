//! timm's folders: `config.json` read and written. Its tensor names are ours.

mod read;
mod write;

pub(super) use read::{describes, info, loaded, pair, size};
pub(super) use write::folder;
