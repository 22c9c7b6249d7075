//! The model, packed: what `VisionTransformer` is to candle, this is to the engine.
//!
//! Each part is a struct that is generic over its linear layers. A plan, made from the crate's description of the network in
//! [`layers`], has [`LinearSource`]s, which say where the layers are stored. Packing replaces them by [`PackedLinear`]s, in
//! parallel.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use super::buffer::Buffer;
use super::kernel::Kernel;
use super::norm::Norm;
use super::packed::PackedLinear;
use super::packing::LinearSource;
use super::shape::Shape;
use super::tensors::vector;
use super::threads::Threads;
use super::tiles::Rows;
use crate::{BlockKind, Config, Error, MlpKind, Result, Weights, layers};

/// The later switches of [`Config`] that this file handles or refuses. Any other one is refused.
const SWITCHES: [&str; 7] =
    ["norm", "patch_norm", "scale_attn_norm", "scale_mlp_norm", "block", "diff_attn", "pool_include_prefix"];

/// Every weight of a model except for its blocks.
pub(super) struct Net<L = PackedLinear> {
    pub(super) patch: L,
    pub(super) patch_norm: Option<Norm>,
    /// Class, distillation and register tokens, with their position embedding.
    pub(super) prefix: Option<Table>,
    /// The patches' position embedding.
    pub(super) positions: Option<Table>,
    pub(super) norm_pre: Option<Norm>,
    pub(super) norm: Option<Norm>,
    pub(super) attn_pool: Option<AttnPool<L>>,
    pub(super) fc_norm: Option<Norm>,
    pub(super) pre_logits: Option<L>,
    pub(super) head: Option<L>,
    pub(super) head_dist: Option<L>,
}

/// `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`, with LayerScale multiplied into the weights.
pub(super) struct Block<L = PackedLinear> {
    pub(super) norm1: Norm,
    pub(super) qkv: L,
    pub(super) qk_norm: Option<(Norm, Norm)>,
    pub(super) attn_norm: Option<Norm>,
    pub(super) proj: L,
    pub(super) norm2: Norm,
    pub(super) mlp: Mlp<L>,
}

pub(super) struct Mlp<L = PackedLinear> {
    pub(super) fc1: L,
    pub(super) norm: Option<Norm>,
    pub(super) fc2: L,
}

/// Attention pooling, whose query is computed while loading.
pub(super) struct AttnPool<L = PackedLinear> {
    pub(super) query: Table,
    pub(super) kv: L,
    pub(super) proj: L,
    pub(super) norm: Norm,
    pub(super) mlp: Mlp<L>,
}

/// Where the blocks of a pass come from.
pub(super) enum Blocks {
    /// They were packed when the model was loaded.
    Held(Vec<Block>),
    /// Every pass reads and packs them again, a few at a time.
    Streamed(Arc<dyn Weights>),
}

/// A few f32 rows.
pub(super) struct Table {
    pub(super) rows: Rows,
    pub(super) count: usize,
    _memory: Buffer,
}

impl Table {
    fn new(values: &[f32], width: usize) -> Self {
        let count = values.len() / width;
        let memory = Buffer::new(Rows::bytes(count, width));
        // SAFETY: the buffer has these bytes and is stored beside the view
        let rows = unsafe { Rows::new(memory.ptr(), count, width) };
        for (i, row) in values.chunks_exact(width).enumerate() {
            // SAFETY: the view has `count` rows of `width` values, and nothing else refers to them yet
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), rows.row(i), width) };
        }
        Self { rows, count, _memory: memory }
    }
}

/// Layers that are packed together, each on whichever thread is free.
#[derive(Default)]
struct Batch(Vec<(LinearSource, Shape, Option<PackedLinear>)>);

/// The place of a layer in a [`Batch`].
struct Ticket(usize);

/// The layers of a [`Batch`], packed.
struct Packed(Vec<Option<PackedLinear>>);

impl Batch {
    /// Adds a layer that is packed in this shape, into the memory of `old` if that has the same form.
    fn add(&mut self, source: LinearSource, shape: Shape, old: Option<PackedLinear>) -> Ticket {
        self.0.push((source, shape, old));
        Ticket(self.0.len() - 1)
    }

    fn pack(self, weights: &dyn Weights, kernel: &dyn Kernel, threads: &Threads) -> Result<Packed> {
        let slots: Vec<_> =
            self.0.into_iter().map(|(source, shape, old)| Mutex::new((source, shape, old, None))).collect();
        threads.run(&|worker| {
            worker.each(slots.len(), |i| {
                let (source, shape, old, packed) = &mut *slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                *packed = Some(source.pack(weights, kernel, *shape, old.take()));
            });
        });
        let packed = slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner).3);
        Ok(Packed(packed.map(Option::transpose).collect::<Result<_>>()?))
    }
}

impl Packed {
    fn take(&mut self, Ticket(i): Ticket) -> PackedLinear {
        self.0[i].take().expect("`run` has packed every layer, and each has one ticket")
    }

    fn bytes(&self) -> usize {
        self.0.iter().flatten().map(PackedLinear::bytes).sum()
    }
}

impl<L> Mlp<L> {
    fn map<M>(self, f: &mut impl FnMut(L) -> M) -> Mlp<M> {
        Mlp { fc1: f(self.fc1), norm: self.norm, fc2: f(self.fc2) }
    }
}

impl<L> Block<L> {
    fn map<M>(self, f: &mut impl FnMut(L) -> M) -> Block<M> {
        let Self { norm1, qkv, qk_norm, attn_norm, proj, norm2, mlp } = self;
        Block { norm1, qkv: f(qkv), qk_norm, attn_norm, proj: f(proj), norm2, mlp: mlp.map(f) }
    }
}

impl<L> AttnPool<L> {
    fn map<M>(self, f: &mut impl FnMut(L) -> M) -> AttnPool<M> {
        let Self { query, kv, proj, norm, mlp } = self;
        AttnPool { query, kv: f(kv), proj: f(proj), norm, mlp: mlp.map(f) }
    }
}

impl<L> Net<L> {
    fn map<M>(self, f: &mut impl FnMut(L) -> M) -> Net<M> {
        Net {
            patch: f(self.patch),
            patch_norm: self.patch_norm,
            prefix: self.prefix,
            positions: self.positions,
            norm_pre: self.norm_pre,
            norm: self.norm,
            attn_pool: self.attn_pool.map(|pool| pool.map(f)),
            fc_norm: self.fc_norm,
            pre_logits: self.pre_logits.map(&mut *f),
            head: self.head.map(&mut *f),
            head_dist: self.head_dist.map(f),
        }
    }
}

impl Block {
    /// Reads and packs some blocks into the memory of others.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or not finite.
    pub(super) fn read(
        config: &Config,
        weights: &dyn Weights,
        range: Range<usize>,
        into: Vec<Self>,
        kernel: &dyn Kernel,
        threads: &Threads,
    ) -> Result<Vec<Self>> {
        let (mut batch, mut old) = (Batch::default(), Vec::new());
        into.into_iter().for_each(|block| drop(block.map(&mut |linear| old.push(linear))));
        let mut old = old.into_iter();
        let mut add = |source| batch.add(source, kernel.block_shape(), old.next());
        let blocks = range.map(|i| Ok(Block::plan(config, weights, i)?.map(&mut add))).collect::<Result<Vec<_>>>()?;
        let mut packed = batch.pack(weights, kernel, threads)?;
        Ok(blocks.into_iter().map(|block| block.map(&mut |ticket| packed.take(ticket))).collect())
    }
}

impl Block<LinearSource> {
    fn plan(config: &Config, weights: &dyn Weights, i: usize) -> Result<Self> {
        let layers::Block::Standard(layers::StandardBlock { norm1, attn, ls1, norm2, mlp, ls2 }) =
            layers::Block::of(config, i)
        else {
            return Err(lacks(format!("`block` {:?}", config.block)));
        };
        Ok(Self {
            norm1: Norm::read(&norm1, weights)?,
            qkv: match attn.qkv {
                layers::Qkv::Joint(qkv) => qkv.into(),
                _ => return Err(lacks("q, k and v apart")),
            },
            qk_norm: match &attn.qk_norm {
                Some([q, k]) => Some((Norm::read(q, weights)?, Norm::read(k, weights)?)),
                None => None,
            },
            attn_norm: read_if_any(attn.norm.as_ref(), weights)?,
            proj: scaled(attn.proj, ls1),
            norm2: Norm::read(&norm2, weights)?,
            mlp: Mlp::plan(mlp, ls2, weights)?,
        })
    }
}

impl Mlp<LinearSource> {
    fn plan(mlp: layers::Mlp, scale: Option<layers::Parameter>, weights: &dyn Weights) -> Result<Self> {
        let fc1 = match mlp.fc1 {
            layers::MlpInput::Plain(fc1) => fc1.into(),
            layers::MlpInput::Packed(fc1) => LinearSource { gated: true, ..fc1.into() },
            layers::MlpInput::Split { gate, value } => {
                LinearSource { n: gate.outputs + value.outputs, second: Some(value.name), gated: true, ..gate.into() }
            }
        };
        Ok(Self { fc1, norm: read_if_any(mlp.norm.as_ref(), weights)?, fc2: scaled(mlp.fc2, scale) })
    }
}

/// A layer whose outputs are multiplied with a factor per channel.
fn scaled(linear: layers::Linear, scale: Option<layers::Parameter>) -> LinearSource {
    LinearSource { scale: scale.map(|scale| scale.name), ..linear.into() }
}

fn read_if_any(norm: Option<&layers::Norm>, weights: &dyn Weights) -> Result<Option<Norm>> {
    norm.map(|norm| Norm::read(norm, weights)).transpose()
}

fn lacks(what: impl std::fmt::Display) -> Error {
    Error::unsupported(format!("the CPU engine has no {what}; the candle modules do"))
}

impl Net {
    /// Refuses the switches that only the candle modules have.
    pub(super) fn supports(config: &Config) -> Result<()> {
        if let Some(switch) = config.later_switches().iter().find(|switch| !SWITCHES.contains(&switch.as_str())) {
            return Err(lacks(format!("`{switch}`")));
        }
        let wide = config.pooled_dim() != config.embed_dim;
        match config.block {
            BlockKind::Standard if config.diff_attn => Err(lacks("`diff_attn`")),
            BlockKind::Standard if wide && (config.fc_norm || config.dist_token || config.pre_logits.is_some()) => {
                let pool = config.global_pool;
                Err(lacks(format!("`fc_norm`, `dist_token` or `pre_logits` with `global_pool` {pool:?}")))
            }
            BlockKind::Standard if config.dist_token && config.pre_logits.is_some() => {
                Err(lacks("`pre_logits` with `dist_token`"))
            }
            BlockKind::Standard => Ok(()),
            block => Err(lacks(format!("`block` {block:?}"))),
        }
    }

    /// Reads and packs the model and some of its blocks. Returns the bytes of the packed layers, too.
    ///
    /// # Errors
    /// A tensor that is missing, of another shape, or not finite.
    pub(super) fn read(
        config: &Config,
        weights: &dyn Weights,
        blocks: Range<usize>,
        kernel: &dyn Kernel,
        threads: &Threads,
    ) -> Result<(Self, Vec<Block>, usize)> {
        let mut batch = Batch::default();
        let net = Net::plan(config, weights)?.map(&mut |source| batch.add(source, kernel.shape(), None));
        let mut add = |source| batch.add(source, kernel.block_shape(), None);
        let blocks = blocks.map(|i| Ok(Block::plan(config, weights, i)?.map(&mut add))).collect::<Result<Vec<_>>>()?;
        let mut packed = batch.pack(weights, kernel, threads)?;
        let bytes = packed.bytes();
        let mut take = |ticket| packed.take(ticket);
        Ok((net.map(&mut take), blocks.into_iter().map(|block| block.map(&mut take)).collect(), bytes))
    }
}

impl Net<LinearSource> {
    fn plan(config: &Config, weights: &dyn Weights) -> Result<Self> {
        // the blocks are planned one by one, because a streamed pass does not need them all at once
        let layers = layers::Network::of(&Config { depth: 0, ..config.clone() });
        let (prefix, positions) = embeddings(config, &layers, weights)?;
        Ok(Self {
            patch: layers.patch_embed.proj.into(),
            patch_norm: read_if_any(layers.patch_embed.norm.as_ref(), weights)?,
            prefix,
            positions,
            norm_pre: read_if_any(layers.norm_pre.as_ref(), weights)?,
            norm: read_if_any(layers.norm.as_ref(), weights)?,
            attn_pool: layers.attn_pool.map(|pool| AttnPool::plan(pool, weights)).transpose()?,
            // a distilled model has no norm between its tokens and its heads
            fc_norm: read_if_any(layers.fc_norm.as_ref().filter(|_| !config.dist_token), weights)?,
            pre_logits: layers.pre_logits.map(Into::into),
            head: layers.heads.head.map(Into::into),
            head_dist: layers.heads.head_dist.map(Into::into),
        })
    }
}

impl AttnPool<LinearSource> {
    fn plan(pool: layers::AttentionPool, weights: &dyn Weights) -> Result<Self> {
        Ok(Self {
            query: query(&pool.latent, &pool.q, weights)?,
            kv: pool.kv.into(),
            proj: pool.proj.into(),
            norm: Norm::read(&pool.norm, weights)?,
            mlp: Mlp::plan(pool.mlp, None, weights)?,
        })
    }
}

/// Width of the hidden layer of an MLP, after its gate.
pub(super) fn hidden(config: &Config) -> usize {
    if config.mlp == MlpKind::SwigluPacked { config.mlp_hidden / 2 } else { config.mlp_hidden }
}

/// Values of a patch.
pub(super) fn patch_len(config: &Config) -> usize {
    config.in_chans * config.patch_size[0] * config.patch_size[1]
}

/// The tokens before the patches, and the patches' positions.
fn embeddings(
    config: &Config,
    layers: &layers::Network,
    weights: &dyn Weights,
) -> Result<(Option<Table>, Option<Table>)> {
    let dim = config.embed_dim;
    let read = |parameter: &layers::Parameter| vector(weights, &parameter.name, parameter.shape.iter().product());
    let mut prefix = Vec::with_capacity(config.num_prefix_tokens() * dim);
    for token in [&layers.cls_token, &layers.dist_token, &layers.reg_token].into_iter().flatten() {
        prefix.extend(read(token)?);
    }
    let mut positions = None;
    if let Some(parameter) = &layers.pos_embed {
        let covered = if config.no_embed_class { 0 } else { prefix.len() };
        let all = read(parameter)?;
        prefix.iter_mut().zip(&all[..covered]).for_each(|(x, p)| *x += p);
        positions = Some(Table::new(&all[covered..], dim));
    }
    Ok(((!prefix.is_empty()).then(|| Table::new(&prefix, dim)), positions))
}

/// The pooling's query `Wq · latent + b`, which is the same for every image.
fn query(latent: &layers::Parameter, q: &layers::Linear, weights: &dyn Weights) -> Result<Table> {
    let dim = q.inputs;
    let latent = vector(weights, &latent.name, dim)?;
    let weight = vector(weights, &format!("{}.weight", q.name), q.outputs * dim)?;
    let bias = vector(weights, &format!("{}.bias", q.name), q.outputs)?;
    let dot = |row: &[f32]| row.iter().zip(&latent).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
    let query: Vec<_> = weight.chunks_exact(dim).zip(&bias).map(|(row, b)| (dot(row) + f64::from(*b)) as f32).collect();
    Ok(Table::new(&query, dim))
}
