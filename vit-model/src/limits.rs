//! What a file may ask for: every bound on the size of an input, checked before anything is allocated on its word.
//!
//! (What a [`Config`](crate::Config) may hold is in [`Config::validate`](crate::Config::validate), field by field.)

/// Bytes of a JSON file: a configuration, an index of shards.
pub const JSON_BYTES: usize = 16 << 20;
/// Bytes of a file of class names.
pub const LABELS_BYTES: usize = 64 << 20;
/// Classes without a name among those that have one.
pub const UNNAMED_CLASSES: usize = 1 << 18;
/// Bytes of a safetensors header, as the format says.
pub const HEADER_BYTES: usize = 100_000_000;
/// Dimensions of a tensor.
pub const RANK: usize = 32;
/// Tensors of an index of shards.
pub const INDEXED: usize = 1 << 20;
/// Files that a model is sharded into.
pub const SHARDS: usize = 4096;
/// Bytes of a `tokenizer.json`. The largest in use, SigLIP 2's with 256,000 tokens, has 34 million.
pub const TOKENIZER_BYTES: usize = 64 << 20;
/// Bytes of a text that is tokenised. A text tower reads at most a few dozen words of it.
pub const TEXT_BYTES: usize = 1 << 16;
/// Texts of one zero-shot classifier: labels times templates.
pub const PROMPTS: usize = 1 << 22;
/// Files of weights that are fetched of one repository.
pub const FETCHED_SHARDS: usize = 1024;
/// Bytes of a file of weights that is fetched.
pub const FETCHED_BYTES: u64 = 64 << 30;

/// Pixels of the largest picture that is decoded, and of the largest that a resize may make: 256 million.
pub const PIXELS: u64 = 256_000_000;
/// Bytes that decoding one picture may take, the decoder's own buffers included.
pub const DECODER_BYTES: u64 = 900_000_000;
/// Bytes of the largest JPEG file: its decoder wants the file in memory.
pub const JPEG_FILE_BYTES: u64 = 256 << 20;
/// Scans of a progressive JPEG. Encoders write about ten; each scan passes over the whole picture.
pub const JPEG_SCANS: usize = 500;
/// Largest side of a picture before and after a resize: the filter's weights take tens of bytes per pixel of a side.
pub const RESIZED_SIDE: u64 = 1 << 22;

/// Largest side of a model's input, in pixels.
pub const INPUT_SIDE: usize = 16384;
/// Most pixels of a model's input.
pub const INPUT_PIXELS: usize = 1 << 26;
/// Largest side that a configuration may ask a picture to be resized to.
pub const RESIZE_SIDE: usize = 1 << 16;

/// Bytes of a PyTorch checkpoint's pickle, which names the tensors but does not contain them.
pub const PICKLE_BYTES: usize = 64 << 20;
/// Values that a pickle may describe.
pub const PICKLE_VALUES: usize = 8 << 20;
/// Bytes of the name of a storage in a pickle.
pub const STORAGE_NAME: usize = 128;
/// Entries of a PyTorch checkpoint's archive.
pub const ARCHIVE_ENTRIES: usize = 1 << 18;
/// Bytes of the archive's directory.
pub const ARCHIVE_DIRECTORY_BYTES: usize = 32 << 20;
/// Elements that a tensor may have more than its storage, because it repeats them.
pub const REPEATED: usize = 1 << 20;
