//! Nearest neighbours by cosine similarity, exactly, among the vectors of a file that `vit-cli embed` wrote.

// a function that is not inlined into the one that enables vector instructions is compiled without them
#![allow(clippy::inline_always)]

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::{Device, Tensor};
use pulp::NullaryFnOnce;
use rayon::prelude::*;

use crate::checkpoint::safetensors::Safetensors;
use crate::vectorize::dispatch;
use crate::weights::{Dtype, Weights as _};
use crate::{Error, Result, memory};

/// The tensor with the vectors.
const TENSOR: &str = "embeddings";

/// Bytes that a thread reads at once. They stay in its second-level cache until they are multiplied, so that the vectors cross
/// the memory bus once.
const STRETCH: usize = 128 << 10;

/// Rows of a block whose products with another block are computed at once by [`Index::duplicates`].
const BLOCK: usize = 1024;

/// Independent sums of a scalar product: two vectors of AVX-512, so that additions do not wait for each other.
const LANES: usize = 32;

/// Vectors with names, on disk. A search reads the file from beginning to end and keeps nothing of it, so an index may be larger
/// than memory.
///
/// ```no_run
/// use vit_model::{Predictor, similar::Index};
///
/// # #[cfg(feature = "image")]
/// # fn main() -> vit_model::Result<()> {
/// let (model, photos) = (Predictor::open("dinov2-small")?, Index::open("photos.safetensors")?);
/// for hit in photos.search(&model.embed("cat.jpg")?, 5)? {
///     println!("{:.3}  {}", hit.similarity, photos.name(hit.row));
/// }
/// # Ok(())
/// # }
/// # #[cfg(not(feature = "image"))]
/// # fn main() {}
/// ```
#[derive(Debug)]
pub struct Index {
    file: Safetensors,
    rows: usize,
    len: usize,
    names: Vec<String>,
}

/// A vector that is similar to a query.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Hit {
    /// Its row in the index.
    pub row: usize,
    /// The cosine of the angle between both: 1 if they have the same direction. 0 if one of them is zero.
    pub similarity: f32,
}

impl Index {
    /// Opens a safetensors file with the tensor `embeddings` `[N, D]` f32, and the metadata entry `files` (or `texts`), a JSON
    /// list of N names.
    ///
    /// # Errors
    /// What the file is instead, or what it lacks.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = Safetensors::open(path)?;
        let fail = |why: String| Error::file(path, why);
        let Some(tensor) = file.tensors().get(TENSOR) else {
            let why = format!("has no tensor `{TENSOR}`; `vit-cli embed --output FILE.safetensors` writes an index");
            return Err(fail(why));
        };
        let &[rows, len] = &*tensor.shape else {
            return Err(fail(format!("`{TENSOR}` has the shape {:?}, expected [N, D]", tensor.shape)));
        };
        if tensor.dtype != Dtype::F32 || len == 0 {
            return Err(fail(format!(
                "`{TENSOR}` is {:?} {:?}, expected f32 and at least one column",
                tensor.dtype, tensor.shape
            )));
        }
        let listed = ["files", "texts"].iter().find_map(|key| file.metadata().get(*key));
        let names: Vec<String> = match listed {
            Some(list) => serde_json::from_str(list).map_err(|error| fail(format!("the list of names: {error}")))?,
            None => (0..rows).map(|row| row.to_string()).collect(),
        };
        if names.len() != rows {
            return Err(fail(format!("{} names for {rows} vectors", names.len())));
        }
        Ok(Self { file, rows, len, names })
    }

    /// The number of vectors.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Values of a vector.
    pub fn embedding_len(&self) -> usize {
        self.len
    }

    /// The name of a vector: the file that was embedded. Empty for a row that is not there.
    pub fn name(&self, row: usize) -> &str {
        self.names.get(row).map_or("", String::as_str)
    }

    /// What the file says of itself besides the names: `model`, `layer`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.file.metadata()
    }

    /// The `k` vectors most similar to `query`, the most similar first; equal ones in the order of the file.
    ///
    /// # Errors
    /// [`Error::Input`] for a query of another length or that is not finite; what cannot be read.
    pub fn search(&self, query: &[f32], k: usize) -> Result<Vec<Hit>> {
        if query.len() != self.len {
            let (want, found) = (self.len, query.len());
            return Err(Error::Input(format!("the index has vectors of {want} values, the query has {found}")));
        }
        if let Some(bad) = query.iter().find(|value| !value.is_finite()) {
            return Err(Error::Input(format!("a query has to be finite, found {bad}")));
        }
        let query = crate::text::normalized(query);
        let per_stretch = (STRETCH / 4 / self.len).max(1);
        let stretches = self.rows.div_ceil(per_stretch);
        let best = (0..stretches)
            .into_par_iter()
            .map_init(
                || (self.file.stretches(TENSOR), Vec::new(), Vec::new()),
                |(read, bytes, values), stretch| -> Result<Vec<Hit>> {
                    let read = read.as_ref().map_err(|error| Error::Input(error.to_string()))?;
                    let first = stretch * per_stretch;
                    let rows = per_stretch.min(self.rows - first);
                    bytes.resize(rows * self.len * 4, 0);
                    values.resize(rows * self.len, 0.0);
                    read(first * self.len * 4, bytes)?;
                    let mut hits = Vec::with_capacity(rows);
                    dispatch(Products { query: &query, bytes, values, first, hits: &mut hits });
                    Ok(best(hits, k))
                },
            )
            .try_reduce(Vec::new, |mut all, more| {
                all.extend(more);
                Ok(best(all, k))
            })?;
        Ok(best)
    }

    /// All pairs that are at least as similar as `threshold`, the first row before the second, sorted. The whole index is in
    /// memory while it runs, and the time grows with the square of its rows.
    ///
    /// # Errors
    /// What cannot be read; a lack of memory.
    pub fn duplicates(&self, threshold: f32) -> Result<Vec<(usize, usize, f32)>> {
        let count = self.rows.saturating_mul(self.len);
        // the file's bytes and their values are there at once
        memory::check(count.saturating_mul(8), "the index")?;
        let mut unit: Vec<f32> = Vec::with_capacity(count);
        for value in self.file.read(TENSOR)?.chunks_exact(4) {
            unit.push(f32::from_le_bytes(value.try_into().unwrap_or_default()));
        }
        unit.par_chunks_exact_mut(self.len).for_each(|row| {
            let length = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
            row.iter_mut().for_each(|v| *v = if length > 0.0 { (f64::from(*v) / length) as f32 } else { 0.0 });
        });
        let all = Tensor::from_vec(unit, (self.rows, self.len), &Device::Cpu)?;
        let block = |from: usize| all.narrow(0, from, BLOCK.min(self.rows - from));
        let mut pairs = Vec::new();
        for above in (0..self.rows).step_by(BLOCK) {
            let rows = block(above)?;
            for left in (above..self.rows).step_by(BLOCK) {
                let products = rows.matmul(&block(left)?.t()?)?.to_vec2::<f32>()?;
                for (i, row) in products.iter().enumerate() {
                    let first = above + i;
                    let near = row.iter().enumerate().filter(|&(j, &cosine)| left + j > first && cosine >= threshold);
                    pairs.extend(near.map(|(j, &cosine)| (first, left + j, cosine)));
                }
            }
        }
        pairs.sort_by_key(|&(a, b, _)| (a, b));
        Ok(pairs)
    }
}

/// The `k` best hits, sorted.
fn best(mut hits: Vec<Hit>, k: usize) -> Vec<Hit> {
    let order = |a: &Hit, b: &Hit| b.similarity.total_cmp(&a.similarity).then(a.row.cmp(&b.row));
    if hits.len() > k && k > 0 {
        hits.select_nth_unstable_by(k - 1, order);
    }
    hits.truncate(k);
    hits.sort_unstable_by(order);
    hits
}

/// The cosine of a query of length 1 with every vector of a stretch.
struct Products<'a> {
    query: &'a [f32],
    bytes: &'a [u8],
    values: &'a mut [f32],
    first: usize,
    hits: &'a mut Vec<Hit>,
}

impl NullaryFnOnce for Products<'_> {
    type Output = ();

    #[inline(always)]
    fn call(self) {
        let Self { query, bytes, values, first, hits } = self;
        for (value, bytes) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f32::from_le_bytes(*bytes);
        }
        for (i, row) in values.chunks_exact(query.len()).enumerate() {
            let (mut products, mut squares) = ([0.0_f32; LANES], [0.0_f32; LANES]);
            let (whole, rest) = row.as_chunks::<LANES>();
            let (query_whole, query_rest) = query.as_chunks::<LANES>();
            for (row, query) in whole.iter().zip(query_whole) {
                for lane in 0..LANES {
                    products[lane] += row[lane] * query[lane];
                    squares[lane] += row[lane] * row[lane];
                }
            }
            let mut product: f32 = products.iter().sum();
            let mut square: f32 = squares.iter().sum();
            for (row, query) in rest.iter().zip(query_rest) {
                product += row * query;
                square += row * row;
            }
            let similarity = if square > 0.0 { product / square.sqrt() } else { 0.0 };
            hits.push(Hit { row: first + i, similarity });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::{Values, save_tensors};
    use crate::random::SplitMix64;

    /// An index of random vectors, and the vectors.
    fn index(rows: usize, len: usize) -> (tempfile::TempDir, Index, Vec<f32>) {
        let mut random = SplitMix64(7);
        let mut values = random.normal(rows * len);
        if rows > 3 {
            // a copy of another length, and a vector without a direction
            let copy: Vec<f32> = values[..len].iter().map(|v| v * 3.0).collect();
            values[(rows - 1) * len..].copy_from_slice(&copy);
            values[len..2 * len].fill(0.0);
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.safetensors");
        let names: Vec<String> = (0..rows).map(|row| format!("{row}.png")).collect();
        let names = serde_json::to_string(&names).unwrap();
        save_tensors(&path, &[(TENSOR, &[rows, len], Values::F32(&values))], &[("files", names)], &[] as &[&Path])
            .unwrap();
        let index = Index::open(&path).unwrap();
        (dir, index, values)
    }

    fn cosine(a: &[f32], b: &[f32]) -> f64 {
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(x, y)| f64::from(*x) * f64::from(*y)).sum::<f64>();
        let lengths = (dot(a, a) * dot(b, b)).sqrt();
        if lengths > 0.0 { dot(a, b) / lengths } else { 0.0 }
    }

    #[test]
    fn hits_are_the_nearest_in_f64() {
        // widths around the lanes, and rows over several stretches
        for (rows, len) in [(5, 1), (700, 31), (500, 33), (3000, 384), (1, 64)] {
            let (_dir, index, values) = index(rows, len);
            let query = &values[..len];
            let mut want: Vec<(usize, f64)> =
                values.chunks_exact(len).map(|row| cosine(query, row)).enumerate().collect();
            want.sort_by(|a, b| b.1.total_cmp(&a.1));
            let found = index.search(query, 10).unwrap();
            assert_eq!(found.len(), rows.min(10));
            for (hit, want) in found.iter().zip(&want) {
                // sums of up to 384 products in f32, in lanes of at most 12
                assert!((f64::from(hit.similarity) - want.1).abs() < 1e-6, "{hit:?}, expected {want:?}");
                assert!((cosine(query, &values[hit.row * len..][..len]) - f64::from(hit.similarity)).abs() < 1e-6);
            }
            assert_eq!(index.name(found[0].row), format!("{}.png", found[0].row));
        }
    }

    #[test]
    fn duplicates_are_all_pairs_above_the_threshold() {
        let (_dir, index, values) = index(2100, 24);
        let found = index.duplicates(0.7).unwrap();
        let rows: Vec<&[f32]> = values.chunks_exact(24).collect();
        let mut want = Vec::new();
        for (a, row) in rows.iter().enumerate() {
            want.extend((a + 1..rows.len()).filter(|&b| cosine(row, rows[b]) >= 0.7).map(|b| (a, b)));
        }
        assert!(want.len() > 5 && want.contains(&(0, 2099)));
        assert_eq!(found.iter().map(|&(a, b, _)| (a, b)).collect::<Vec<_>>(), want);
    }

    #[test]
    fn another_file_or_query_is_refused() {
        let (dir, index, _) = index(4, 8);
        assert!(index.search(&[0.0; 7], 1).unwrap_err().to_string().contains("vectors of 8 values, the query has 7"));
        assert!(index.search(&[f32::NAN; 8], 1).is_err());
        assert_eq!(index.search(&[0.0; 8], 2).unwrap().len(), 2);
        assert!(index.search(&[1.0; 8], 0).unwrap().is_empty());
        let path = dir.path().join("other.safetensors");
        let none: &[&Path] = &[];
        save_tensors(&path, &[("x", &[1, 2], Values::F32(&[1.0, 2.0]))], &[], none).unwrap();
        assert!(Index::open(&path).unwrap_err().to_string().contains("vit-cli embed"));
        save_tensors(&path, &[(TENSOR, &[2], Values::F32(&[1.0, 2.0]))], &[], none).unwrap();
        assert!(Index::open(&path).unwrap_err().to_string().contains("expected [N, D]"));
        let two = [("files", "[\"a\"]".to_owned())];
        save_tensors(&path, &[(TENSOR, &[2, 1], Values::F32(&[1.0, 2.0]))], &two, none).unwrap();
        assert!(Index::open(&path).unwrap_err().to_string().contains("1 names for 2 vectors"));
    }
}
