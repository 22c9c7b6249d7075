//! The network in candle modules, one file per part. Nothing here names a device: tensors are wherever the `VarBuilder`
//! puts them. Which layers there are, their names and their sizes is described in [`layers`].
//!
//! Shapes: `B` images of `C` channels, `N` tokens of width `D`, `H` heads of width `d = D / H`. The dimension of heads
//! precedes that of images, so that splitting tokens into heads moves one dimension only.

pub(crate) mod attention;
mod block;
mod embed;
pub mod finetune;
#[cfg(all(test, feature = "cuda"))]
mod gpu;
#[cfg(test)]
mod gradients;
pub mod intermediates;
pub(crate) mod linear;
mod mlp;
pub(crate) mod norm;
mod parallel;
#[cfg(test)]
mod parameters;
mod pool;
pub mod pos_embed;
mod positions;
pub(crate) mod rel_pos;
mod rope;
mod scale;
pub mod tap;
pub(crate) mod weights;

use candle_core::{DType, Device, IndexOp, Result as CandleResult, Tensor};
use candle_nn::{Init, VarBuilder};

use self::block::Block;
use self::embed::PatchEmbed;
use self::linear::{Linear, WEIGHT};
use self::norm::{Norm, norm_if_any};
use self::pool::AttentionPool;
use self::pos_embed::Resample;
use self::positions::Positions;
use self::tap::Tap;
use crate::config::{Config, Pool};
use crate::layers::{self, Network};
use crate::{Error, Result};

/// Initial values of the tokens of a model that is trained from scratch; a checkpoint's values replace them.
const TOKEN: Init = Init::Randn { mean: 0.0, stdev: 1e-6 };

/// Initial values of the frequencies of rotary positions, which timm draws at random, too.
const FREQUENCY: Init = Init::Randn { mean: 0.0, stdev: 1.0 };

/// What [`VisionTransformer::prune_intermediate_layers`] drops beside blocks (timm's `prune_norm` and `prune_head`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Prune {
    /// Nothing else.
    #[default]
    Blocks,
    /// The final norm, if it runs before the pooling.
    FinalNorm,
    /// The pooling and all that follows it.
    Head,
    /// Both.
    FinalNormAndHead,
}

/// A Vision Transformer: any architecture that a [`Config`] describes.
///
/// It runs on the device and in the type of its weights. Built over a `VarMap`, it can be trained: operations without a
/// gradient in candle are replaced by plain formulas if a tensor is tracked.
#[derive(Clone, Debug)]
pub struct VisionTransformer {
    config: Config,
    patch_embed: PatchEmbed,
    cls_token: Option<Tensor>,
    dist_token: Option<Tensor>,
    reg_token: Option<Tensor>,
    pos_embed: Option<Tensor>,
    rope_freqs: Option<Tensor>,
    rel_pos_bias: Option<Tensor>,
    /// The positions of images of the model's own size, unless training changes what they are computed from.
    positions: Option<Positions>,
    dtype: DType,
    norm_pre: Option<Norm>,
    blocks: Vec<Block>,
    norm: Option<Norm>,
    attn_pool: Option<AttentionPool>,
    fc_norm: Option<Norm>,
    pre_logits: Option<Linear>,
    head: Option<Linear>,
    head_dist: Option<Linear>,
    /// How position embeddings are resampled for images of another size. If `None`, such images are refused.
    dynamic: Option<Resample>,
}

impl VisionTransformer {
    /// Builds a model with the parameters of `vb`, under timm's names.
    ///
    /// # Errors
    /// A configuration that [`Config::validate`] refuses, or a parameter that `vb` does not have in this shape.
    #[allow(clippy::needless_pass_by_value)] // all of candle hands a `VarBuilder` down by value
    pub fn new(config: &Config, vb: VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        let network = Network::of(config);
        let norm = |layer: &Option<layers::Norm>| Norm::read_if_any(layer.as_ref(), &vb);
        let parameter = |parameter: &Option<layers::Parameter>, init| {
            parameter.as_ref().map(|p| vb.get_with_hints(&p.shape[..], &p.name, init)).transpose()
        };
        let blocks = network.blocks.iter().enumerate();
        let attn_pool = network.attn_pool.as_ref().map(|pool| AttentionPool::read(pool, config, &vb)).transpose()?;
        let [head, head_dist] = Self::heads(&network.heads, &vb)?;
        let mut model = Self {
            config: config.clone(),
            patch_embed: PatchEmbed::read(&network.patch_embed, &vb)?,
            cls_token: parameter(&network.cls_token, TOKEN)?,
            dist_token: parameter(&network.dist_token, TOKEN)?,
            reg_token: parameter(&network.reg_token, TOKEN)?,
            pos_embed: parameter(&network.pos_embed, WEIGHT)?,
            rope_freqs: parameter(&network.rope_freqs, FREQUENCY)?,
            rel_pos_bias: parameter(&network.rel_pos_bias, Init::Const(0.0))?,
            positions: None,
            dtype: vb.dtype(),
            norm_pre: norm(&network.norm_pre)?,
            blocks: blocks.map(|(i, block)| Block::read(block, config, i, &vb)).collect::<CandleResult<_>>()?,
            norm: norm(&network.norm)?,
            attn_pool,
            fc_norm: norm(&network.fc_norm)?,
            pre_logits: network.pre_logits.as_ref().map(|layer| Linear::read(layer, &vb)).transpose()?,
            head,
            head_dist,
            dynamic: None,
        };
        model.remember_positions(vb.device())?;
        Ok(model)
    }

    /// Computes the positions for images of the model's own size, unless they can change.
    fn remember_positions(&mut self, device: &Device) -> Result<()> {
        let trained = [&self.rope_freqs, &self.rel_pos_bias].into_iter().flatten().any(Tensor::track_op);
        self.positions = if trained {
            None
        } else {
            Some(self.compute_positions(self.config.grid(), Resample::default(), device)?)
        };
        Ok(())
    }

    fn compute_positions(&self, grid: [usize; 2], how: Resample, device: &Device) -> CandleResult<Positions> {
        let learned = [self.rope_freqs.as_ref(), self.rel_pos_bias.as_ref()];
        Positions::new(&self.config, grid, how, learned, self.dtype, device)
    }

    /// The positions for images of the size of `x`, which [`pos_embed_for`](Self::pos_embed_for) accepts.
    fn positions_for(&self, x: &Tensor) -> CandleResult<Positions> {
        let (_, _, h, w) = x.dims4()?;
        let grid = [h / self.config.patch_size[0], w / self.config.patch_size[1]];
        match &self.positions {
            Some(positions) if grid == self.config.grid() => Ok(positions.clone()),
            _ => self.compute_positions(grid, self.dynamic.unwrap_or_default(), x.device()),
        }
    }

    /// The head, and the one on the distillation token.
    fn heads(heads: &layers::Heads, vb: &VarBuilder<'_>) -> CandleResult<[Option<Linear>; 2]> {
        let read = |layer: &Option<layers::Linear>| layer.as_ref().map(|layer| Linear::read(layer, vb)).transpose();
        Ok([read(&heads.head)?, read(&heads.head_dist)?])
    }

    /// Replaces the head by that of `config`, and drops attention pooling if `config` has none.
    pub(crate) fn replace_head(&mut self, config: Config, vb: &VarBuilder<'_>) -> Result<()> {
        [self.head, self.head_dist] = Self::heads(&layers::Heads::of(&config), vb)?;
        if config.global_pool != Pool::Map {
            self.attn_pool = None;
        }
        self.config = config;
        Ok(())
    }

    /// Keeps the first `depth` blocks, and drops what `prune` names.
    pub(crate) fn truncate(&mut self, depth: usize, prune: Prune) {
        self.blocks.truncate(depth);
        self.config.depth = self.blocks.len();
        self.config.kv_heads.truncate(self.config.depth);
        if matches!(prune, Prune::FinalNorm | Prune::FinalNormAndHead) {
            self.norm = None;
        }
        if matches!(prune, Prune::Head | Prune::FinalNormAndHead) {
            [self.head, self.head_dist, self.pre_logits] = [None, None, None];
            (self.attn_pool, self.fc_norm) = (None, None);
            (self.config.num_classes, self.config.pre_logits) = (0, None);
            self.config.global_pool = Pool::None;
        }
        self.config.final_norm = self.norm.is_some() || self.fc_norm.is_some();
        self.config.fc_norm = self.fc_norm.is_some();
    }

    /// Prepares the model for images of another size by resampling its position embeddings once.
    ///
    /// This is timm's `set_input_size` if `how` is [`Resample::Bicubic`]. [`Resample::of`] returns what a checkpoint's
    /// own library uses when it loads the checkpoint at another size.
    ///
    /// # Errors
    /// A size that [`Config::validate`] refuses, or a lack of memory.
    pub fn set_input_size(&mut self, img_size: [usize; 2], how: Resample) -> Result<()> {
        let config = Config { img_size, ..self.config.clone() };
        config.validate()?;
        if let Some(table) = &self.pos_embed {
            let prefix = self.config.pos_embed_prefix();
            self.pos_embed = Some(pos_embed::resample(table, prefix, self.config.grid(), config.grid(), how)?);
        }
        let (from, to) = (self.config.grid(), config.grid());
        let resample = |table: &Tensor| rel_pos::resample(table, from, to, how);
        if let Some(table) = &self.rel_pos_bias {
            self.rel_pos_bias = Some(resample(table)?);
        }
        for block in &mut self.blocks {
            block.resize(resample)?;
        }
        self.config = config;
        let device = self.patch_embed.device().clone();
        self.remember_positions(&device)
    }

    /// Lets the model read images of any size that is a multiple of the patch size, with position embeddings resampled
    /// for each input (timm's `dynamic_img_size`, transformers' `interpolate_pos_encoding`). `None` allows only the
    /// model's own size.
    pub fn set_dynamic_size(&mut self, how: Option<Resample>) {
        self.dynamic = how;
    }

    /// Number of blocks.
    pub(crate) fn depth(&self) -> usize {
        self.blocks.len()
    }

    /// Applies the final norm, if there is one before pooling.
    pub(crate) fn norm(&self, x: &Tensor) -> CandleResult<Tensor> {
        norm_if_any(self.norm.as_ref(), x.clone())
    }

    /// The architecture.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// `[B, C, h, w]` → logits `[B, num_classes]`, or the pooled features `[B, D]` if there is no head.
    ///
    /// # Errors
    /// An input with a rank, channel count or size that the model does not read, or a lack of memory.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_head(&self.forward_features(x)?)
    }

    /// `[B, C, h, w]` → tokens `[B, N, D]` after the final norm (if that runs before pooling), as in timm.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_features(&self, x: &Tensor) -> Result<Tensor> {
        self.forward_tapped(x, &mut ())
    }

    /// [`forward_features`](Self::forward_features), calling `tap` on the way.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and any error of the tap.
    pub fn forward_tapped(&self, x: &Tensor, tap: &mut dyn Tap) -> Result<Tensor> {
        let tokens = self.embed(x)?; // [B, N, D]
        tap.embedded(&tokens)?;
        let positions = self.positions_for(x)?;
        let mut x = tokens;
        for (index, block) in self.blocks.iter().enumerate() {
            x = block.forward(&x, &positions, tap)?;
            if !tap.block(index, &x)? {
                break;
            }
        }
        Ok(self.norm(&x)?)
    }

    /// Tokens `[B, N, D]` of [`forward_features`](Self::forward_features) → logits `[B, num_classes]`, or the result of
    /// [`forward_pre_logits`](Self::forward_pre_logits) if there is no head. With `Pool::None` the dimension of tokens
    /// remains. A distilled model returns the mean of its two heads.
    ///
    /// # Errors
    /// An input of another shape, or a lack of memory.
    pub fn forward_head(&self, x: &Tensor) -> Result<Tensor> {
        self.check_tokens(x)?;
        if self.config.dist_token {
            return Ok(self.distilled_logits(x)?);
        }
        let x = self.pre_logits(x)?;
        Ok(self.head.as_ref().map_or(Ok(x.clone()), |head| head.forward(&x))?)
    }

    /// Tokens `[B, N, D]` of [`forward_features`](Self::forward_features) → what the head reads, `[B, D]` (timm's
    /// `forward_head(x, pre_logits=True)`).
    ///
    /// For a distilled model it is the mean of the two tokens that its heads read.
    ///
    /// # Errors
    /// As [`forward_head`](Self::forward_head).
    pub fn forward_pre_logits(&self, x: &Tensor) -> Result<Tensor> {
        self.check_tokens(x)?;
        if self.config.dist_token {
            let [class, dist] = class_and_distillation(x)?;
            return Ok(((class + dist)? * 0.5)?);
        }
        Ok(self.pre_logits(x)?)
    }

    fn check_tokens(&self, x: &Tensor) -> Result<()> {
        let (prefix, width) = (self.config.num_prefix_tokens(), self.config.embed_dim);
        match *x.dims() {
            [_, n, dim] if dim == width && n > prefix => Ok(()),
            ref found => {
                Err(Error::Input(format!("tokens must be [B, N, {width}] with N > {prefix}, found {found:?}")))
            }
        }
    }

    fn pre_logits(&self, x: &Tensor) -> CandleResult<Tensor> {
        let x = norm_if_any(self.fc_norm.as_ref(), self.pool(x)?)?;
        match &self.pre_logits {
            Some(fc) => fc.forward(&x)?.tanh(),
            None => Ok(x),
        }
    }

    /// DeiT's two heads, on the class and the distillation token (arXiv 2012.12877).
    fn distilled_logits(&self, x: &Tensor) -> CandleResult<Tensor> {
        let [class, dist] = class_and_distillation(x)?;
        match (&self.head, &self.head_dist) {
            (Some(head), Some(head_dist)) => (head.forward(&class)? + head_dist.forward(&dist)?)? * 0.5,
            _ => (class + dist)? * 0.5,
        }
    }

    /// `[B, C, h, w]` → the tokens `[B, N, D]` that the first block reads.
    fn embed(&self, x: &Tensor) -> Result<Tensor> {
        let pos_embed = self.pos_embed_for(x)?;
        let x = self.patch_embed.forward(x)?;
        let tokens = [&self.cls_token, &self.dist_token, &self.reg_token];
        let prefix = |x: Tensor| {
            let (b, _, dim) = x.dims3()?;
            let mut parts = Vec::with_capacity(tokens.len() + 1);
            for token in tokens.into_iter().flatten() {
                parts.push(token.broadcast_as((b, token.dim(1)?, dim))?);
            }
            parts.push(x);
            if parts.len() == 1 { Ok(parts.swap_remove(0)) } else { Tensor::cat(&parts, 1) }
        };
        let x = match &pos_embed {
            None => prefix(x)?,
            Some(pos_embed) if self.config.no_embed_class => prefix(x.broadcast_add(pos_embed)?)?,
            Some(pos_embed) => prefix(x)?.broadcast_add(pos_embed)?,
        };
        Ok(norm_if_any(self.norm_pre.as_ref(), x)?)
    }

    /// The position embeddings for images of the size of `x`. Refuses inputs that the model cannot read.
    fn pos_embed_for(&self, x: &Tensor) -> Result<Option<Tensor>> {
        let (c, [h, w], [ph, pw]) = (self.config.in_chans, self.config.img_size, self.config.patch_size);
        match (x.dims(), self.dynamic) {
            (&[b, channels, height, width], _) if b > 0 && channels == c && height == h && width == w => {
                Ok(self.pos_embed.clone())
            }
            (&[b, channels, height, width], Some(how))
                if b > 0 && channels == c && height % ph == 0 && width % pw == 0 =>
            {
                let (from, to) = (self.config.grid(), [height / ph, width / pw]);
                let prefix = self.config.pos_embed_prefix();
                let resample = |table| pos_embed::resample(table, prefix, from, to, how);
                self.pos_embed.as_ref().map(resample).transpose()
            }
            (found, Some(_)) => Err(Error::Input(format!(
                "the model reads [B, {c}, h, w] with h a multiple of {ph} and w of {pw}, found {found:?}"
            ))),
            (found, None) => Err(Error::Input(format!("the model reads [B, {c}, {h}, {w}], found {found:?}"))),
        }
    }

    /// `[B, N, D] → [B, D]`, by the configuration's `global_pool`.
    fn pool(&self, x: &Tensor) -> CandleResult<Tensor> {
        let from = if self.config.pool_include_prefix { 0 } else { self.config.num_prefix_tokens() };
        let patches = || x.narrow(1, from, x.dim(1)? - from)?.contiguous();
        match self.config.global_pool {
            Pool::None => Ok(x.clone()),
            Pool::Token => x.i((.., 0))?.contiguous(),
            Pool::Avg => patches()?.mean(1),
            Pool::Max => patches()?.max(1),
            Pool::Avgmax => {
                let x = patches()?;
                (x.max(1)? + x.mean(1)?)? * 0.5
            }
            Pool::TokenAvg => Tensor::cat(&[x.i((.., 0))?, patches()?.mean(1)?], 1), // [B, 2 D]
            Pool::Map => match &self.attn_pool {
                Some(attn_pool) => attn_pool.forward(&patches()?),
                None => candle_core::bail!("`global_pool` map without attn_pool"),
            },
        }
    }
}

/// The first two tokens, `[B, D]` each.
fn class_and_distillation(x: &Tensor) -> CandleResult<[Tensor; 2]> {
    Ok([x.i((.., 0))?.contiguous()?, x.i((.., 1))?.contiguous()?])
}
