//! A checkpoint for images of another size: its position embeddings are resampled as the library that it comes from does it.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{computed::Computed, model::Checkpoint};
use crate::{
    Config, RelPosBias, Result,
    vit::pos_embed::{Resample, resample},
    vit::rel_pos,
    weights::{Weights, candle_dtype},
};

impl Checkpoint {
    /// The same model for images of `[height, width]` pixels. Position embeddings are resampled as timm's `set_input_size` or
    /// transformers' `interpolate_pos_encoding` does, always from those that are stored; the preprocessing makes images of the
    /// new size in the same proportions.
    ///
    /// # Errors
    /// [`Error::Config`](crate::Error::Config) for a size that no model can have; a table that cannot be read.
    pub fn resized(self, img_size: [usize; 2]) -> Result<Self> {
        let mut resized = self.for_size(img_size)?;
        let [_, h, w] = resized.info.preprocess.input_size;
        if [h, w] != img_size {
            resized.info.preprocess.set_input_size(img_size);
            resized.info.validate()?;
        }
        Ok(resized)
    }

    /// The same model for the size of the images that its own preprocessing makes.
    pub(super) fn for_its_input(self) -> Result<Self> {
        let [_, h, w] = self.info.preprocess.input_size;
        self.for_size([h, w])
    }

    fn for_size(mut self, img_size: [usize; 2]) -> Result<Self> {
        if self.info.model.img_size == img_size {
            return Ok(self);
        }
        let (stored_size, stored) =
            self.stored.clone().unwrap_or_else(|| (self.info.model.img_size, self.weights.clone()));
        let mut info = self.info.clone();
        let from = Config { img_size: stored_size, ..info.model.clone() };
        info.model.img_size = img_size;
        info.validate()?;
        let how = Resample::of(&info);
        let weights = with_positions(stored.clone(), from.grid(), &info.model, how)?;
        super::check(&info.model, weights.as_ref())?;
        (self.info, self.weights, self.stored) = (info, weights, Some((stored_size, stored)));
        Ok(self)
    }

    /// The size of the images that the stored position embeddings are for.
    pub fn stored_img_size(&self) -> [usize; 2] {
        self.stored.as_ref().map_or(self.info.model.img_size, |(size, _)| *size)
    }
}

/// The weights with position embeddings and biases by relative position for `model`, resampled from those for the grid `from`.
pub(super) fn with_positions(
    weights: Arc<dyn Weights>,
    from: [usize; 2],
    model: &Config,
    how: Resample,
) -> Result<Arc<dyn Weights>> {
    if from == model.grid() {
        return Ok(weights);
    }
    let weights = with_biases(weights, from, model, how);
    if !model.pos_embed {
        return Ok(weights);
    }
    let prefix = model.pos_embed_prefix();
    let patches = from[0].checked_mul(from[1]);
    let Some(len) = patches.and_then(|patches| patches.checked_add(prefix)) else { return Ok(weights) };
    let shape = [1, len, model.embed_dim];
    // if the table is missing or has another shape, `Checkpoint::new` reports it when it checks all names and shapes
    let Some(info) = weights.tensors().get("pos_embed").filter(|info| info.shape == shape) else { return Ok(weights) };
    let table = Tensor::from_raw_buffer(&weights.read("pos_embed")?, candle_dtype(info.dtype), &shape, &Device::Cpu)?;
    let table = resample(&table.to_dtype(DType::F32)?, prefix, from, model.grid(), how)?;
    replaced(weights, &table)
}

/// The end of the names of tables of biases by relative position.
const BIASES: &str = "relative_position_bias_table";

/// The weights with tables of biases by relative position for another grid, which are resampled when they are read.
fn with_biases(weights: Arc<dyn Weights>, from: [usize; 2], model: &Config, how: Resample) -> Arc<dyn Weights> {
    if model.rel_pos_bias == RelPosBias::None {
        return weights;
    }
    let stored = Config { img_size: from, patch_size: [1, 1], ..model.clone() };
    let (shape, to) = ([stored.rel_pos_len(), model.num_heads], model.grid());
    let tables = weights.tensors().iter().filter(|(name, info)| name.ends_with(BIASES) && info.shape == shape);
    let names: Vec<String> = tables.map(|(name, _)| name.clone()).collect();
    let mut computed = Computed::new(weights);
    for name in names {
        let table = name.clone();
        computed.replace(name, vec![model.rel_pos_len(), model.num_heads], move |weights| {
            let table = Tensor::from_vec(weights.read_f32(&table)?, &shape[..], &Device::Cpu)?;
            let table = rel_pos::resample(&table, from, to, how)?.flatten_all()?.to_vec1::<f32>()?;
            Ok(table.iter().flat_map(|v| v.to_le_bytes()).collect())
        });
    }
    Arc::new(computed)
}

/// The grid of the tables of biases in a file that are for another grid than the model's, if it is square, as libraries assume.
pub(super) fn grid_of_biases(weights: &dyn Weights, model: &Config) -> Option<[usize; 2]> {
    let (_, info) = weights.tensors().iter().find(|(name, _)| name.ends_with(BIASES))?;
    let rows = *info.shape.first()?;
    if model.rel_pos_bias == RelPosBias::None || rows == model.rel_pos_len() {
        return None;
    }
    let distances = rows.checked_sub(3)?;
    let side = distances.isqrt();
    (side.checked_mul(side) == Some(distances) && side % 2 == 1).then(|| [side.div_ceil(2); 2])
}

/// The weights with another table of position embeddings, in f32.
pub(super) fn replaced(weights: Arc<dyn Weights>, table: &Tensor) -> Result<Arc<dyn Weights>> {
    let mut computed = Computed::new(weights);
    computed.put("pos_embed", table)?;
    Ok(Arc::new(computed))
}

/// The grid of a table of position embeddings that is square, as libraries assume when they load it for another size.
pub(super) fn square_grid(tokens: usize, prefix: usize) -> Option<[usize; 2]> {
    let patches = tokens.checked_sub(prefix)?;
    let side = patches.isqrt();
    (side > 0 && side.checked_mul(side) == Some(patches)).then_some([side, side])
}

/// What is said of a model whose files ask for another size than its position embeddings have.
pub(super) fn note(from: [usize; 2], model: &Config) -> String {
    let ([fh, fw], [h, w], [ih, iw]) = (from, model.grid(), model.img_size);
    format!("positions: the table of {fh}×{fw} patches is resampled to {h}×{w}, for images of {ih}×{iw}")
}
