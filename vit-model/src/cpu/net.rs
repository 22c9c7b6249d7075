//! The model, packed: what `VisionTransformer` is to candle, this is to the engine.

use std::sync::{Mutex, PoisonError};

use super::buffer::Buffer;
use super::kernel::{Kernel, block_shape};
use super::norm::Norm;
use super::pack::{Linear, Rows, Shape, Source, vector};
use super::threads::Pool;
use crate::{BlockKind, Config, Error, MlpKind, Pool as Pooling, Result, Weights};

/// Every weight of a model, once.
pub(super) struct Net {
    pub(super) patch: Linear,
    pub(super) patch_norm: Option<Norm>,
    /// Class, distillation and register tokens, with their position embedding.
    pub(super) prefix: Option<Table>,
    /// The patches' position embedding.
    pub(super) positions: Option<Table>,
    pub(super) norm_pre: Option<Norm>,
    pub(super) blocks: Vec<Block>,
    pub(super) norm: Option<Norm>,
    pub(super) attn_pool: Option<AttnPool>,
    pub(super) fc_norm: Option<Norm>,
    pub(super) pre_logits: Option<Linear>,
    pub(super) head: Option<Linear>,
    pub(super) head_dist: Option<Linear>,
}

/// `x + ls1(attn(norm1(x)))`, then `x + ls2(mlp(norm2(x)))`, with LayerScale multiplied into the weights.
pub(super) struct Block {
    pub(super) norm1: Norm,
    pub(super) qkv: Linear,
    pub(super) qk_norm: Option<(Norm, Norm)>,
    pub(super) attn_norm: Option<Norm>,
    pub(super) proj: Linear,
    pub(super) norm2: Norm,
    pub(super) mlp: Mlp,
}

pub(super) struct Mlp {
    pub(super) fc1: Linear,
    pub(super) norm: Option<Norm>,
    pub(super) fc2: Linear,
}

/// Attention pooling, its query computed while loading.
pub(super) struct AttnPool {
    pub(super) query: Table,
    pub(super) kv: Linear,
    pub(super) proj: Linear,
    pub(super) norm: Norm,
    pub(super) mlp: Mlp,
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
        let rows = Rows::new(memory.ptr(), width);
        for (i, row) in values.chunks_exact(width).enumerate() {
            // SAFETY: the buffer has these rows, and is ours alone
            unsafe { std::ptr::copy_nonoverlapping(row.as_ptr(), rows.row(i), width) };
        }
        Self { rows, count, _memory: memory }
    }
}

/// Linear layers that are read and packed in parallel, and taken by name afterwards.
struct Linears {
    names: Vec<String>,
    packed: Vec<Option<Linear>>,
}

impl Linears {
    /// Source by source, each in its shape, into the memory of `old`, as far as that goes.
    fn read(
        sources: Vec<(Source, Shape)>,
        old: impl IntoIterator<Item = Linear>,
        weights: &dyn Weights,
        kernel: &dyn Kernel,
        pool: &Pool,
    ) -> Result<Self> {
        let old = old.into_iter().map(Some).chain(std::iter::repeat_with(|| None));
        let slots: Vec<_> = sources.iter().zip(old).map(|(_, old)| Mutex::new((old, None))).collect();
        pool.run(&|worker| {
            worker.each(sources.len(), |i| {
                let mut slot = slots[i].lock().unwrap_or_else(PoisonError::into_inner);
                let (source, shape) = &sources[i];
                slot.1 = Some(Linear::read(weights, source, kernel, *shape, slot.0.take()));
            });
        });
        let packed =
            slots.into_iter().map(|slot| slot.into_inner().unwrap_or_else(PoisonError::into_inner).1.transpose());
        let names = sources.into_iter().map(|(source, _)| source.name).collect();
        Ok(Self { packed: packed.collect::<Result<_>>()?, names })
    }

    fn take(&mut self, name: &str) -> Result<Linear> {
        let at = self.names.iter().position(|other| other == name);
        at.and_then(|at| self.packed[at].take()).ok_or_else(|| Error::tensor(name, "is not part of the engine's plan"))
    }
}

fn source(name: impl Into<String>, n: usize, k: usize, bias: bool) -> Source {
    Source { name: name.into(), second: None, scale: None, n, k, bias, gated: false }
}

impl Block {
    /// Reads and packs some blocks into the memory of others.
    pub(super) fn read(
        config: &Config,
        weights: &dyn Weights,
        range: std::ops::Range<usize>,
        into: Vec<Self>,
        kernel: &dyn Kernel,
        pool: &Pool,
    ) -> Result<Vec<Self>> {
        let shape = block_shape(kernel);
        let sources = range.clone().flat_map(|i| Self::sources(config, i)).map(|source| (source, shape)).collect();
        let old = into.into_iter().flat_map(|block| [block.qkv, block.proj, block.mlp.fc1, block.mlp.fc2]);
        let mut linears = Linears::read(sources, old, weights, kernel, pool)?;
        range.map(|i| Self::take(config, weights, i, &mut linears)).collect()
    }

    /// The linear layers of a block.
    fn sources(config: &Config, i: usize) -> [Source; 4] {
        let (dim, hidden, bias) = (config.embed_dim, Net::hidden(config), config.proj_bias);
        let name = |part: &str| format!("blocks.{i}.{part}");
        let scale = |part: &str| config.layer_scale.then(|| name(&format!("{part}.gamma")));
        let fc1 = match config.mlp {
            MlpKind::Mlp => source(name("mlp.fc1"), hidden, dim, bias),
            MlpKind::Swiglu => {
                let second = Some(name("mlp.fc1_x"));
                Source { second, gated: true, ..source(name("mlp.fc1_g"), 2 * hidden, dim, bias) }
            }
            MlpKind::SwigluPacked => Source { gated: true, ..source(name("mlp.fc1"), 2 * hidden, dim, bias) },
        };
        [
            source(name("attn.qkv"), 3 * dim, dim, config.qkv_bias),
            Source { scale: scale("ls1"), ..source(name("attn.proj"), dim, dim, bias) },
            fc1,
            Source { scale: scale("ls2"), ..source(name("mlp.fc2"), dim, hidden, bias) },
        ]
    }

    fn take(config: &Config, weights: &dyn Weights, i: usize, linears: &mut Linears) -> Result<Self> {
        let name = |part: &str| format!("blocks.{i}.{part}");
        let norm = |there: bool, part, dim| there.then(|| Norm::read(config, weights, &name(part), dim)).transpose();
        let (dim, head_dim) = (config.embed_dim, config.head_dim());
        let q_norm = norm(config.qk_norm, "attn.q_norm", head_dim)?;
        let k_norm = norm(config.qk_norm, "attn.k_norm", head_dim)?;
        Ok(Self {
            norm1: Norm::read(config, weights, &name("norm1"), dim)?,
            qkv: linears.take(&name("attn.qkv"))?,
            qk_norm: q_norm.zip(k_norm),
            attn_norm: norm(config.scale_attn_norm, "attn.norm", dim)?,
            proj: linears.take(&name("attn.proj"))?,
            norm2: Norm::read(config, weights, &name("norm2"), dim)?,
            mlp: Mlp {
                fc1: linears.take(&name(if config.mlp == MlpKind::Swiglu { "mlp.fc1_g" } else { "mlp.fc1" }))?,
                norm: norm(config.scale_mlp_norm, "mlp.norm", Net::hidden(config))?,
                fc2: linears.take(&name("mlp.fc2"))?,
            },
        })
    }
}

impl Net {
    /// Refuses the switches that only the candle modules have.
    pub(super) fn supports(config: &Config) -> Result<()> {
        let lacks =
            |what: String| Err(Error::Unsupported(format!("the CPU engine has no {what}; the candle modules do")));
        match config.block {
            BlockKind::Standard if config.diff_attn => lacks("`diff_attn`".into()),
            BlockKind::Standard
                if config.pooled_dim() != config.embed_dim
                    && (config.fc_norm || config.dist_token || config.pre_logits.is_some()) =>
            {
                lacks(format!("`fc_norm`, `dist_token` or `pre_logits` with `global_pool` {:?}", config.global_pool))
            }
            BlockKind::Standard => Ok(()),
            block => lacks(format!("`block` {block:?}")),
        }
    }

    /// Width of the hidden layer, after the gate.
    pub(super) fn hidden(config: &Config) -> usize {
        if config.mlp == MlpKind::SwigluPacked { config.mlp_hidden / 2 } else { config.mlp_hidden }
    }

    /// Reads and packs everything.
    pub(super) fn read(config: &Config, weights: &dyn Weights, kernel: &dyn Kernel, pool: &Pool) -> Result<Self> {
        let (shape, of_blocks) = (kernel.shape(), block_shape(kernel));
        let blocks = (0..config.depth).flat_map(|i| Block::sources(config, i)).map(|source| (source, of_blocks));
        let sources = Self::sources(config).into_iter().map(|source| (source, shape)).chain(blocks).collect();
        let mut linears = Linears::read(sources, [], weights, kernel, pool)?;
        let blocks = (0..config.depth).map(|i| Block::take(config, weights, i, &mut linears)).collect::<Result<_>>()?;
        Ok(Self { blocks, ..Self::take(config, weights, &mut linears)? })
    }

    /// Everything but the blocks.
    fn take(config: &Config, weights: &dyn Weights, linears: &mut Linears) -> Result<Self> {
        let dim = config.embed_dim;
        let norm = |there: bool, name: &str| there.then(|| Norm::read(config, weights, name, dim)).transpose();
        let (prefix, positions) = Self::embeddings(config, weights)?;
        let attn_pool = match config.global_pool {
            Pooling::Map => Some(AttnPool {
                query: Self::query(config, weights)?,
                kv: linears.take("attn_pool.kv")?,
                proj: linears.take("attn_pool.proj")?,
                norm: Norm::read(config, weights, "attn_pool.norm", dim)?,
                mlp: Mlp {
                    fc1: linears.take("attn_pool.mlp.fc1")?,
                    norm: None,
                    fc2: linears.take("attn_pool.mlp.fc2")?,
                },
            }),
            _ => None,
        };
        let there = config.num_classes > 0;
        Ok(Self {
            patch: linears.take("patch_embed.proj")?,
            patch_norm: norm(config.patch_norm, "patch_embed.norm")?,
            prefix,
            positions,
            norm_pre: norm(config.pre_norm, "norm_pre")?,
            blocks: vec![],
            norm: norm(config.final_norm && !config.fc_norm, "norm")?,
            attn_pool,
            // a distilled model has no norm between its tokens and its heads
            fc_norm: norm(config.final_norm && config.fc_norm && !config.dist_token, "fc_norm")?,
            pre_logits: (config.pre_logits.is_some() && !config.dist_token)
                .then(|| linears.take("pre_logits.fc"))
                .transpose()?,
            head: there.then(|| linears.take("head")).transpose()?,
            head_dist: (there && config.dist_token).then(|| linears.take("head_dist")).transpose()?,
        })
    }

    /// Values of a patch.
    pub(super) fn patch_len(config: &Config) -> usize {
        config.in_chans * config.patch_size[0] * config.patch_size[1]
    }

    /// Every linear layer of the plan but those of the blocks.
    fn sources(config: &Config) -> Vec<Source> {
        let dim = config.embed_dim;
        let mut all = vec![source("patch_embed.proj", dim, Self::patch_len(config), config.patch_bias)];
        if config.global_pool == Pooling::Map {
            all.push(source("attn_pool.kv", 2 * dim, dim, true));
            all.push(source("attn_pool.proj", dim, dim, true));
            all.push(source("attn_pool.mlp.fc1", config.mlp_hidden, dim, true));
            all.push(source("attn_pool.mlp.fc2", dim, config.mlp_hidden, true));
        }
        let mut width = config.pooled_dim();
        if let Some(pre) = &config.pre_logits {
            all.push(source("pre_logits.fc", pre.size, width, true));
            width = pre.size;
        }
        if config.num_classes > 0 {
            all.push(source("head", config.num_classes, width, config.head_bias));
            if config.dist_token {
                all.push(source("head_dist", config.num_classes, width, config.head_bias));
            }
        }
        all
    }

    /// The tokens before the patches, and the patches' positions.
    fn embeddings(config: &Config, weights: &dyn Weights) -> Result<(Option<Table>, Option<Table>)> {
        let dim = config.embed_dim;
        let mut prefix = Vec::with_capacity(config.num_prefix_tokens() * dim);
        for (count, name) in [
            (usize::from(config.class_token), "cls_token"),
            (usize::from(config.dist_token), "dist_token"),
            (config.reg_tokens, "reg_token"),
        ] {
            if count > 0 {
                prefix.extend(vector(weights, name, count * dim)?);
            }
        }
        let mut positions = None;
        if config.pos_embed {
            let covered = if config.no_embed_class { 0 } else { prefix.len() };
            let all = vector(weights, "pos_embed", covered + config.num_patches() * dim)?;
            prefix.iter_mut().zip(&all[..covered]).for_each(|(x, p)| *x += p);
            positions = Some(Table::new(&all[covered..], dim));
        }
        Ok(((!prefix.is_empty()).then(|| Table::new(&prefix, dim)), positions))
    }

    /// The pooling's query is the same for every image: `Wq · latent + b`.
    fn query(config: &Config, weights: &dyn Weights) -> Result<Table> {
        let dim = config.embed_dim;
        let latent = vector(weights, "attn_pool.latent", dim)?;
        let weight = vector(weights, "attn_pool.q.weight", dim * dim)?;
        let bias = vector(weights, "attn_pool.q.bias", dim)?;
        let dot = |row: &[f32]| row.iter().zip(&latent).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
        let query: Vec<_> =
            weight.chunks_exact(dim).zip(&bias).map(|(row, b)| (dot(row) + f64::from(*b)) as f32).collect();
        Ok(Table::new(&query, dim))
    }

    /// Bytes of the packed weights.
    pub(super) fn bytes(&self) -> usize {
        let mut all = vec![&self.patch];
        for block in &self.blocks {
            all.extend([&block.qkv, &block.proj, &block.mlp.fc1, &block.mlp.fc2]);
        }
        if let Some(pool) = &self.attn_pool {
            all.extend([&pool.kv, &pool.proj, &pool.mlp.fc1, &pool.mlp.fc2]);
        }
        all.extend([&self.pre_logits, &self.head, &self.head_dist].into_iter().flatten());
        all.into_iter().map(Linear::bytes).sum()
    }
}
