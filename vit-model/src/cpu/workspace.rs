//! The memory of a pass: where each activation is stored, and the scratch of each thread.

use super::attention::AttentionFrom;
use super::buffer::Buffer;
use super::kernel::Kernel;
use super::linear::{Add, LinearTo};
use super::net::{hidden, patch_len};
use super::shape::Shape;
use super::tiles::{Acts, Rows, Strips};
use crate::{Config, Pool};

/// The activations and the scratch of a pass. It grows when a pass needs more, and is then kept.
#[derive(Default)]
pub(super) struct Workspace {
    images: usize,
    memory: Option<Buffer>,
    scratch: Vec<Buffer>,
}

/// Views of the activations of a pass. Those that a model does not need have no rows.
pub(super) struct Activations {
    pub(super) patches: Acts,
    /// The patches before their norm.
    pub(super) embedded: Rows,
    /// The tokens.
    pub(super) x: Rows,
    /// What a linear layer reads: normed tokens, or what attention wrote.
    pub(super) a: Acts,
    /// Queries, keys and values.
    pub(super) qkv: Rows,
    /// The same memory, as the linear layer of a block writes it and its attention reads it.
    pub(super) between: (LinearTo, AttentionFrom),
    /// Results that a norm reads before they are rounded.
    pub(super) wide: Rows,
    /// Hidden values of an MLP.
    pub(super) h: Acts,
    /// What a linear layer in integers reads.
    pub(super) bytes: Acts,
    pub(super) pooled: Rows,
    pub(super) tail: Acts,
    pub(super) tail_h: Acts,
    pub(super) tail_p: Acts,
    /// The output of `pre_logits`.
    pub(super) pre: Rows,
    pub(super) logits: Rows,
}

/// Cuts views from a stretch of memory, or measures how much they need.
struct Cutter {
    start: *mut u8,
    used: usize,
}

impl Cutter {
    fn cut(&mut self, bytes: usize) -> *mut u8 {
        let at = self.start.wrapping_add(self.used);
        self.used += bytes.next_multiple_of(256);
        at
    }

    fn rows(&mut self, rows: usize, columns: usize) -> Rows {
        // SAFETY: `Activations::new` promises the bytes that are cut, or that the view is not used
        unsafe { Rows::new(self.cut(Rows::bytes(rows, columns)), rows, columns) }
    }

    fn acts(&mut self, shape: Shape, rows: usize, columns: usize) -> Acts {
        // SAFETY: `Activations::new` promises the bytes that are cut, or that the view is not used
        unsafe { Acts::new(self.cut(Acts::bytes(shape, rows, columns)), shape, rows, columns) }
    }
}

impl Activations {
    /// The views for `images` images, and the bytes that they need from `start` on.
    ///
    /// # Safety
    /// `start` is valid for so many zeroed bytes as long as the views are used, or they are not used at all.
    unsafe fn new(config: &Config, kernel: &dyn Kernel, images: usize, start: *mut u8) -> (Self, usize) {
        let (shape, dim, hidden) = (kernel.shape(), config.embed_dim, hidden(config));
        let (patches, rows) = (images * config.num_patches(), images * config.num_tokens());
        let (tail, few) = (tail_rows(config, images), few_rows(config, images));
        let wide = if config.scale_attn_norm { dim } else { 0 }.max(if config.scale_mlp_norm { hidden } else { 0 });
        let pre = config.pre_logits.as_ref().map_or(0, |pre| pre.size);
        let tail_hidden = tail_hidden(config);
        // the rows of a view, if the model needs it
        let rows_if = |there: bool, rows: usize| if there { rows } else { 0 };
        let mut memory = Cutter { start, used: 0 };
        let patches_acts = memory.acts(shape, patches, patch_len(config));
        let embedded = memory.rows(rows_if(config.patch_norm, patches), dim);
        let x = memory.rows(rows, dim);
        let a = memory.acts(shape, rows, dim);
        let (qkv, between) = Self::between(config, kernel, rows, &mut memory);
        let this = Self {
            patches: patches_acts,
            embedded,
            x,
            a,
            qkv,
            between,
            wide: memory.rows(rows_if(wide > 0, rows), wide),
            h: memory.acts(shape, rows, hidden),
            bytes: memory.acts(kernel.block_shape(), rows_if(kernel.integers().is_some(), rows), dim.max(hidden)),
            pooled: memory.rows(rows_if(config.global_pool != Pool::None, 2 * images), config.pooled_dim()),
            tail: memory.acts(shape, tail.max(few), config.pooled_dim()),
            tail_h: memory.acts(shape, rows_if(tail_hidden > 0, few), tail_hidden),
            tail_p: memory.acts(shape, rows_if(pre > 0, tail), pre),
            pre: memory.rows(rows_if(pre > 0, tail), pre),
            logits: memory.rows(rows_if(config.num_classes > 0, tail), config.num_classes),
        };
        (this, memory.used)
    }

    /// Queries, keys and values: in strips, if the kernel's attention reads such and heads are whole strips and panels. If a
    /// norm has to run before they are rounded, they are rows.
    fn between(
        config: &Config,
        kernel: &dyn Kernel,
        rows: usize,
        memory: &mut Cutter,
    ) -> (Rows, (LinearTo, AttentionFrom)) {
        let (columns, head) = (3 * config.embed_dim, config.head_dim());
        let strips = kernel.strips().map(|shape| (shape, Strips::bytes(shape.elements, rows, columns)));
        let start = memory.cut(Rows::bytes(rows, columns).max(strips.map_or(0, |(_, bytes)| bytes)));
        // SAFETY: `Activations::new` promises the bytes that are cut, or that the views are not used
        let qkv = unsafe { Rows::new(start, rows, columns) };
        match strips {
            Some((shape, _)) if !config.qk_norm && head.is_multiple_of(shape.cols.max(shape.elements.chunk())) => {
                // SAFETY: as for `qkv`, of which and of these strips a pass uses one at a time
                let strips = unsafe { Strips::new(start, shape.elements, rows, columns) };
                (qkv, (LinearTo::Strips(strips), AttentionFrom::Strips(strips)))
            }
            _ => (qkv, (LinearTo::Rows(qkv, Add::Nothing), AttentionFrom::Rows(qkv))),
        }
    }
}

impl Workspace {
    /// Makes room for `images` images.
    pub(super) fn fit(&mut self, config: &Config, kernel: &dyn Kernel, images: usize, threads: usize) {
        if self.scratch.is_empty() {
            let bytes = (kernel.linear_scratch())
                .max(kernel.attention_scratch(config.num_tokens(), config.head_dim()))
                .max(patch_len(config) * size_of::<f32>());
            self.scratch = (0..threads).map(|_| Buffer::new(bytes)).collect();
        }
        if self.images != images {
            // SAFETY: the views are dropped at once
            let (_, bytes) = unsafe { Activations::new(config, kernel, images, std::ptr::null_mut()) };
            // cleared for fewer images, too, because padding has to be zero and moves when the number of images changes
            match &mut self.memory {
                Some(memory) if memory.len() >= bytes => memory.clear(),
                _ => self.memory = Some(Buffer::new(bytes)),
            }
            self.images = images;
        }
    }

    /// The activations, and the scratch of each thread. The views are valid while the scratch is borrowed. They have room for
    /// the images of [`fit`](Self::fit), so that padding stays where it is for passes over fewer.
    ///
    /// # Safety
    /// `config` and `kernel` are those of the last [`fit`](Self::fit).
    pub(super) unsafe fn activations(&mut self, config: &Config, kernel: &dyn Kernel) -> (Activations, &[Buffer]) {
        let start = self.memory.as_ref().map_or(std::ptr::null_mut(), Buffer::ptr);
        // SAFETY: `fit` has allocated the bytes that these views need, and the mutable borrow makes them the only ones
        let (activations, _) = unsafe { Activations::new(config, kernel, self.images, start) };
        (activations, &self.scratch)
    }
}

/// The number of first tokens of an image that the head reads, if it reads no others.
pub(super) fn head_tokens(config: &Config) -> Option<usize> {
    let first = config.global_pool == Pool::Token && config.depth > 0;
    first.then_some(if config.dist_token { 2 } else { 1 })
}

/// Rows of an MLP over what the head reads: in attention pooling, or in the last block.
fn few_rows(config: &Config, images: usize) -> usize {
    images * head_tokens(config).unwrap_or(1)
}

/// Hidden values of that MLP.
fn tail_hidden(config: &Config) -> usize {
    if config.global_pool == Pool::Map { config.mlp_hidden } else { head_tokens(config).map_or(0, |_| hidden(config)) }
}

/// Rows that the head reads.
pub(super) fn tail_rows(config: &Config, images: usize) -> usize {
    if config.global_pool == Pool::None { images * config.num_tokens() } else { images }
}
