//! A canonical expression → the parts of a ViT: one pattern for each module. What does not fit is refused.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use vit_model::config::{Activation, Config, MlpKind, Pool, PreLogits};

use crate::array::Array;
use crate::axes::{self, BROADCAST, Dim, Pick};
use crate::eval::{View, Walk};
use crate::expr::{Constant, Exprs, Head, Id, Layout, Op, PoolKind};
use crate::graph::DType;

/// Why an expression is no ViT, and where.
#[derive(Clone, Debug)]
pub struct Refusal {
    /// The expression that does not fit.
    pub at: Option<Id>,
    /// Why.
    pub why: String,
}

type Found<T> = Result<T, Refusal>;

fn refuse<T>(at: Id, why: impl Into<String>) -> Found<T> {
    Err(Refusal { at: Some(at), why: why.into() })
}

/// The parts of a ViT, found in one output of a graph.
#[derive(Debug)]
pub struct Parts {
    /// The architecture.
    pub config: Config,
    /// Name → rows of constants, one below the other.
    pub tensors: BTreeMap<String, Array>,
    /// Where the channels of the image are.
    pub layout: Layout,
    /// What the graph does to a pixel before the patch embedding: `(scale, shift)` for each channel; empty for nothing.
    pub pixels: Vec<(f64, f64)>,
    /// What stands on top of the logits, from below.
    pub heads: Vec<Head>,
    /// Expression → the module that it belongs to.
    pub owners: HashMap<Id, String>,
    /// The activation of every MLP, and where it is.
    pub acts: Vec<(Activation, Id)>,
    /// What was read from where: what, and the expression.
    pub evidence: Vec<(String, Id)>,
    /// Why a tensor is not as it is stored.
    pub rounded: Vec<String>,
}

/// A residual branch of a block.
enum Branch {
    Attn(Attention),
    Mlp(Mlp),
}

struct Attention {
    proj: Id,
    core: Id,
    heads: usize,
    scale: f64,
    /// The linears of q, k and v.
    qkv: [Id; 3],
    /// The norms of q and k.
    norms: [Option<Id>; 2],
    /// Tokens that keys and values come from, where that is a part.
    sel: Option<(usize, usize)>,
    /// What the keys and values read.
    source: Id,
    queries: Id,
}

struct Mlp {
    fc2: Id,
    /// `fc1`, or gate and value.
    fc1: Vec<Id>,
    act: Activation,
    act_at: Id,
    source: Id,
}

struct Block {
    branch: Branch,
    gamma: Option<Constant>,
    norm: Id,
    whole: Id,
}

struct Finder<'a> {
    x: &'a Exprs,
    tensors: BTreeMap<String, Array>,
    owners: HashMap<Id, String>,
    evidence: Vec<(String, Id)>,
    rounded: Vec<String>,
    eps: BTreeMap<u64, Id>,
    acts: Vec<(Activation, Id)>,
    half: bool,
}

/// Finds the parts of a ViT in an output. `half`: the file holds numbers of 16 bits.
pub fn recognise(walk: &Walk<'_>, view: &View, half: bool) -> Found<Parts> {
    let finder = Finder {
        x: &walk.x,
        tensors: BTreeMap::new(),
        owners: HashMap::new(),
        evidence: Vec::new(),
        rounded: Vec::new(),
        eps: BTreeMap::new(),
        acts: Vec::new(),
        half,
    };
    finder.whole(view)
}

impl Finder<'_> {
    fn op(&self, e: Id) -> &Op {
        self.x.op(e)
    }

    fn arg(&self, e: Id) -> Id {
        self.x.arg(e, 0)
    }

    fn args(&self, e: Id) -> &[Id] {
        &self.x.get(e).args
    }

    fn tokens(&self, e: Id) -> usize {
        self.x.shape(e)[1]
    }

    fn width(&self, e: Id) -> usize {
        self.x.shape(e)[2]
    }

    // ---------------------------------------------------------------------------------------------- tensors

    fn put(&mut self, e: Id, module: &str, name: &str, array: Array) -> Found<()> {
        self.owners.insert(e, module.to_string());
        let full = format!("{module}{}{name}", if name.is_empty() || module.is_empty() { "" } else { "." });
        if !array.stored_dtype().is_float() {
            return refuse(e, format!("`{full}` is of type {:?}, floats are expected", array.stored_dtype()));
        }
        self.tensors.insert(full, array);
        Ok(())
    }

    fn linear(&mut self, e: Id, module: &str) -> Found<()> {
        let Op::Linear { weight, bias } = self.op(e).clone() else { return refuse(e, "a linear is expected") };
        self.put(e, module, "weight", (*weight).clone())?;
        if let Some(bias) = bias {
            self.put(e, module, "bias", (*bias).clone())?;
        }
        Ok(())
    }

    /// A linear of which the family has no kind without a bias: zeros where there is none.
    fn biased_linear(&mut self, e: Id, module: &str) -> Found<()> {
        self.linear(e, module)?;
        if matches!(self.op(e), Op::Linear { bias: None, .. }) {
            let zeros = Array::floats(DType::F32, &[self.width(e)], &vec![0.0; self.width(e)]);
            self.put(e, module, "bias", zeros)?;
        }
        Ok(())
    }

    fn norm(&mut self, e: Id, module: &str, per_head: bool) -> Found<()> {
        let Op::Norm { eps, gain, bias, group } = self.op(e).clone() else { return refuse(e, "a norm is expected") };
        if group != self.width(e) && !per_head {
            return refuse(
                e,
                format!("a norm over {group} of {} channels where one over all is expected", self.width(e)),
            );
        }
        let eps = tidy(eps.0, self.half);
        if !(eps > 0.0 && eps < 1.0) {
            return refuse(e, format!("an epsilon of {eps:e}"));
        }
        if self.eps.insert(eps.to_bits(), e).is_none() {
            self.evidence.push((format!("ln_eps = {eps:e}"), e));
        }
        let constant = |c: Option<Constant>, value: f64| {
            c.map_or_else(|| Array::floats(DType::F32, &[group], &vec![value; group]), |c| (*c).clone())
        };
        self.put(e, module, "weight", constant(gain, 1.0))?;
        self.put(e, module, "bias", constant(bias, 0.0))
    }

    /// Several linears as one, rows one below the other; a bias that only some have is 0 for the others.
    fn pack(&mut self, list: &[Id], module: &str) -> Found<bool> {
        let (mut weights, mut biases, mut any) = (Vec::new(), Vec::new(), false);
        for &e in list {
            let Op::Linear { weight, bias } = self.op(e) else { return refuse(e, "a linear is expected") };
            any |= bias.is_some();
            weights.push((**weight).clone());
            biases.push(bias.as_deref().cloned());
        }
        let first = list[0];
        let join = |parts: &[Array]| Array::concat(parts, 0).map_err(|why| Refusal { at: Some(first), why });
        let weight = join(&weights)?;
        self.put(first, module, "weight", weight)?;
        if any {
            let zeros = |n: usize| Array::floats(DType::F32, &[1], &[0.0]).reshape(&[]).and_then(|z| z.expand(&[n]));
            let parts: Option<Vec<Array>> =
                biases.into_iter().zip(&weights).map(|(b, w)| b.or_else(|| zeros(w.dim(0)))).collect();
            let bias = join(&parts.ok_or(Refusal { at: Some(first), why: "a bias".into() })?)?;
            self.put(first, module, "bias", bias)?;
        }
        for &e in list {
            self.owners.insert(e, module.to_string());
        }
        Ok(any)
    }

    // ---------------------------------------------------------------------------------------------- modules

    /// `fc2(act(fc1(x)))`, or the gated form.
    fn mlp(&self, e: Id) -> Option<Mlp> {
        let linear = |e: Id| matches!(self.op(e), Op::Linear { .. });
        if !linear(e) {
            return None;
        }
        let h = self.arg(e);
        match self.op(h) {
            Op::Act(act) if linear(self.arg(h)) => {
                let fc1 = self.arg(h);
                Some(Mlp { fc2: e, fc1: vec![fc1], act: *act, act_at: h, source: self.arg(fc1) })
            }
            Op::Mul => {
                let &[a, b] = self.args(h) else { return None };
                for (g, u) in [(a, b), (b, a)] {
                    if let Op::Act(act) = self.op(g)
                        && linear(self.arg(g))
                        && linear(u)
                        && self.arg(self.arg(g)) == self.arg(u)
                    {
                        return Some(Mlp {
                            fc2: e,
                            fc1: vec![self.arg(g), u],
                            act: *act,
                            act_at: g,
                            source: self.arg(u),
                        });
                    }
                }
                None
            }
            _ => None,
        }
    }

    /// `proj(softmax(scale · q kᵀ) v)`.
    fn attention(&self, e: Id) -> Option<Attention> {
        if !matches!(self.op(e), Op::Linear { .. }) {
            return None;
        }
        let core = self.arg(e);
        let &Op::Attn { heads, scale } = self.op(core) else { return None };
        let &[q, k, v] = self.args(core) else { return None };
        let under = |e: Id| if matches!(self.op(e), Op::Norm { .. }) { (self.arg(e), Some(e)) } else { (e, None) };
        let ((q, nq), (mut k, nk)) = (under(q), under(k));
        let mut v = v;
        let mut sel = None;
        if let (&Op::Sel { start }, &Op::Sel { start: other }) = (self.op(k), self.op(v))
            && start == other
            && self.tokens(k) == self.tokens(v)
        {
            sel = Some((start, self.tokens(k)));
            (k, v) = (self.arg(k), self.arg(v));
        }
        if ![q, k, v].iter().all(|&e| matches!(self.op(e), Op::Linear { .. })) || self.arg(k) != self.arg(v) {
            return None;
        }
        let (queries, source) = (self.arg(q), self.arg(k));
        Some(Attention { proj: e, core, heads, scale: scale.0, qkv: [q, k, v], norms: [nq, nk], sel, source, queries })
    }

    /// A residual branch over `res`.
    fn branch(&self, e: Id, res: Id) -> Option<Block> {
        let whole = e;
        let (mut e, mut gamma) = (e, None);
        if let Op::MulC(c) = self.op(e)
            && c.dim(0) == 1
            && c.dim(1) == 1
        {
            gamma = Some(c.clone());
            e = self.arg(e);
        }
        let over = |norm: Id| matches!(self.op(norm), Op::Norm { .. }) && self.arg(norm) == res;
        if let Some(mlp) = self.mlp(e)
            && over(mlp.source)
        {
            return Some(Block { norm: mlp.source, branch: Branch::Mlp(mlp), gamma, whole });
        }
        let attn = self.attention(e)?;
        let own = attn.sel.is_none() && attn.queries == attn.source && over(attn.source);
        own.then_some(Block { norm: attn.source, branch: Branch::Attn(attn), gamma, whole })
    }

    /// Residual branches down from `e`, first to last, and what they stand on.
    fn blocks(&self, e: Id) -> (Vec<Block>, Id) {
        let (mut at, mut out) = (e, Vec::new());
        while *self.op(at) == Op::Add {
            let &[a, b] = self.args(at) else { break };
            let Some((block, res)) = self.branch(b, a).map(|k| (k, a)).or_else(|| self.branch(a, b).map(|k| (k, b)))
            else {
                break;
            };
            out.push(block);
            at = res;
        }
        out.reverse();
        (out, at)
    }

    /// The factor that q's weights take in: 1, or `√head_dim` where the graph has no scale at all.
    fn scale(&mut self, attn: &Attention) -> Found<f64> {
        let d = self.width(attn.qkv[0]) / attn.heads.max(1);
        let want = (d as f64).powf(-0.5);
        // two factors, each rounded to bfloat16's eight bits
        let tolerance = if self.half { 8e-3 } else { self.x.tolerance };
        if (attn.scale - want).abs() <= tolerance * want {
            return Ok(1.0);
        }
        if (attn.scale - 1.0).abs() <= 1e-6 && attn.norms[0].is_none() {
            return Ok(1.0 / want);
        }
        refuse(attn.core, format!("the attention scale is {:.6}, not head_dim^-0.5 = {want:.6}", attn.scale))
    }

    fn packed_qkv(&mut self, attn: &Attention, module: &str, factor: f64) -> Found<bool> {
        let biased = self.pack(&attn.qkv, module)?;
        if factor != 1.0 {
            // the scale was folded into q: unfolded again
            let n = self.width(attn.qkv[0]);
            let rows = self.width(attn.qkv[0]) + self.width(attn.qkv[1]) + self.width(attn.qkv[2]);
            let factors: Vec<f64> = (0..rows).map(|k| if k < n { factor } else { 1.0 }).collect();
            for name in ["weight", "bias"] {
                let key = format!("{module}.{name}");
                if let Some(a) = self.tensors.get(&key) {
                    let by =
                        Array::floats(DType::F64, &if a.rank() == 2 { vec![rows, 1] } else { vec![rows] }, &factors);
                    let scaled = a.times(&by).map_err(|why| Refusal { at: Some(attn.core), why })?;
                    self.tensors.insert(key, scaled);
                }
            }
            self.rounded.push(format!("`{module}`: the attention scale was folded into q and is unfolded again"));
        }
        Ok(biased)
    }

    // ---------------------------------------------------------------------------------------------- the model

    fn whole(mut self, view: &View) -> Found<Parts> {
        let (mut e, mut sel) = (view.e, view.sel);
        let mut heads = Vec::new();
        loop {
            match self.op(e) {
                Op::Out(head) => heads.push(*head),
                Op::Func(crate::expr::Func::Sigmoid) if matches!(self.op(self.arg(e)), Op::Linear { .. }) => {
                    heads.push(Head::Sigmoid);
                }
                _ => break,
            }
            self.owners.insert(e, "output".into());
            e = self.arg(e);
            if heads.len() > 4 {
                return refuse(e, "a pile of output activations");
            }
        }
        heads.reverse();
        self.check_layout(view, e, &heads)?;
        if self.x.shape(e).len() != 3 {
            return refuse(e, format!("the output is no tokens: {}", self.x.show(e, 2)));
        }
        // DeiT: the mean of two heads
        let mut dist = None;
        let (core, half) = self.x.scaled(e);
        if half == 0.5
            && *self.op(core) == Op::Add
            && let &[a, b] = self.args(core)
            && let (&Op::Sel { start: i }, &Op::Sel { start: j }) = (self.op(a), self.op(b))
            && let (x, y) = (self.arg(a), self.arg(b))
            && matches!((self.op(x), self.op(y)), (Op::Linear { .. }, Op::Linear { .. }))
            && self.arg(x) == self.arg(y)
        {
            let one = self.tokens(a) == 1 && self.tokens(b) == 1;
            (e, dist) = match (i, j) {
                (0, 1) if one => (x, Some(y)),
                (1, 0) if one => (y, Some(x)),
                _ => return refuse(core, "two heads over other tokens than the class and distillation tokens"),
            };
            self.owners.insert(core, "head".into());
            sel = Some((0, 1));
        }
        // the head, and the linear and tanh before it
        let (mut head, mut pre) = (None, None);
        if matches!(self.op(e), Op::Linear { .. }) && self.attention(e).is_none() && self.mlp(e).is_none() {
            head = Some(e);
            e = self.arg(e);
        }
        if *self.op(e) == Op::Func(crate::expr::Func::Tanh) && matches!(self.op(self.arg(e)), Op::Linear { .. }) {
            self.owners.insert(e, "pre_logits".into());
            pre = Some(self.arg(e));
            e = self.arg(self.arg(e));
        }
        let (mut fc_norm, mut final_norm) = (None, None);
        let (pool, mut range, attn_pool);
        if matches!(self.op(e), Op::Norm { .. }) && self.pooled(self.arg(e)).is_some() {
            fc_norm = Some(e);
            e = self.arg(e);
        }
        if let Some((kind, lo, n, below)) = self.pooled(e) {
            self.owners.insert(e, "pool".into());
            if sel.is_some() {
                return refuse(e, "tokens are selected after pooling");
            }
            (pool, range, attn_pool) = (kind, Some((lo, n)), None);
            e = below;
        } else if sel == Some((0, 1)) {
            (pool, range, attn_pool) = (Pool::Token, None, None);
        } else if let Some(found) = self.map_head(e) {
            if sel.is_some() {
                return refuse(e, "tokens are selected after pooling");
            }
            e = found.source;
            range = Some(found.sel.unwrap_or((0, self.tokens(e))));
            (pool, attn_pool) = (Pool::Map, Some(found));
        } else if sel.is_none() {
            (pool, range, attn_pool) = (Pool::None, None, None);
        } else {
            let at = if head.is_some() { head.unwrap_or(e) } else { e };
            return refuse(at, format!("the tokens {:?} are read, not the class token", sel.unwrap_or_default()));
        }
        if matches!(self.op(e), Op::Norm { .. }) && !self.blocks(self.arg(e)).0.is_empty() {
            final_norm = Some(e);
            e = self.arg(e);
        }
        if let (Some(norm), Some(_)) = (fc_norm, final_norm) {
            return refuse(norm, "a norm before and one after the pooling");
        }
        let (blocks, below) = self.blocks(e);
        if blocks.is_empty() {
            return refuse(e, format!("this is not a pre-norm transformer block: {}", self.x.show(e, 3)));
        }
        e = below;
        let embed_dim = self.width(e);
        let facts = self.encoder(&blocks)?;
        // the embedding
        let mut pre_norm = None;
        if matches!(self.op(e), Op::Norm { .. }) {
            pre_norm = Some(e);
            self.norm(e, "norm_pre", false)?;
            e = self.arg(e);
        }
        let embedding = self.embedding(e)?;
        let patch = embedding.patch;
        let Op::Patch { weight, bias, grid, layout, pixels } = self.op(patch).clone() else {
            return refuse(patch, "patches");
        };
        let image = self.arg(patch);
        let [axis_c, axis_h, axis_w] = layout.axes().map(usize::from);
        let shape = self.x.shape(image);
        let (img_size, in_chans) = ([shape[axis_h], shape[axis_w]], shape[axis_c]);
        let patches = grid[0] * grid[1];
        let prefix = embedding.prefix;
        if let Some((lo, n)) = range.take()
            && (lo, n) != (prefix, patches)
        {
            return refuse(
                view.e,
                format!("tokens {lo} to {} are pooled, the patches are {prefix} to {}", lo + n, prefix + patches),
            );
        }
        if pool == Pool::Token && prefix == 0 {
            return refuse(view.e, "the first token is read as a class token, and it is a patch");
        }
        if dist.is_some() && prefix != 2 {
            return refuse(
                view.e,
                format!(
                    "two heads need a class and a distillation token, the graph has {prefix} tokens before the patches"
                ),
            );
        }
        let mut no_embed_class = false;
        self.positions(&embedding, dist.is_some(), &mut no_embed_class)?;
        self.patch(patch, &weight, bias.as_ref(), &pixels, self.raw_input(image))?;

        if let Some(m) = &attn_pool {
            self.map_tensors(m, &facts)?;
        }
        if let Some(e) = fc_norm {
            self.norm(e, "fc_norm", false)?;
        }
        if let Some(e) = final_norm {
            self.norm(e, "norm", false)?;
        }
        if let Some(e) = pre {
            self.linear(e, "pre_logits.fc")?;
        }
        let mut head_bias = false;
        if let Some(e) = head {
            self.linear(e, "head")?;
            head_bias = matches!(self.op(e), Op::Linear { bias: Some(_), .. });
        }
        if let Some(e) = dist {
            self.linear(e, "head_dist")?;
            if head.is_some_and(|h| self.width(h) != self.width(e)) {
                return refuse(e, "two heads of different sizes");
            }
        }
        if self.eps.len() > 1 {
            let list: Vec<String> = self.eps.keys().map(|&b| format!("{:e}", f64::from_bits(b))).collect();
            let (_, &at) = self.eps.iter().max_by_key(|(_, e)| **e).unwrap_or((&0, &view.e));
            return refuse(at, format!("the norms differ in epsilon: {}", list.join(", ")));
        }
        let (Some((&eps, _)), Some(&(act, _))) = (self.eps.iter().next(), self.acts.first()) else {
            return refuse(view.e, "a model without norms");
        };
        if let Some((other, at)) = self.acts.iter().find(|a| a.0 != act) {
            return refuse(*at, format!("the activations differ: {act:?} and {other:?}"));
        }
        let config = Config {
            img_size,
            patch_size: [weight.dim(2), weight.dim(3)],
            in_chans,
            num_classes: head.map_or(0, |e| self.width(e)),
            embed_dim,
            depth: blocks.len() / 2,
            num_heads: facts.heads,
            mlp_hidden: facts.hidden,
            mlp: facts.mlp,
            act,
            ln_eps: f64::from_bits(eps),
            patch_bias: self.tensors.contains_key("patch_embed.proj.bias"),
            qkv_bias: facts.qkv_bias,
            proj_bias: facts.proj_bias,
            qk_norm: facts.qk_norm,
            class_token: prefix > 0,
            dist_token: dist.is_some(),
            reg_tokens: if dist.is_some() { 0 } else { prefix.saturating_sub(1) },
            no_embed_class,
            pos_embed: embedding.pos.is_some(),
            pre_norm: pre_norm.is_some(),
            final_norm: final_norm.is_some() || fc_norm.is_some(),
            fc_norm: fc_norm.is_some(),
            layer_scale: facts.layer_scale,
            global_pool: pool,
            pre_logits: pre.map(|e| PreLogits { size: self.width(e), act: "tanh".into() }),
            head_bias,
            ..EMPTY
        };
        config.validate().map_err(|e| Refusal { at: Some(view.e), why: e.to_string() })?;
        Ok(Parts {
            config,
            tensors: self.tensors,
            layout,
            pixels: pixels.iter().map(|p| (p.0.0, p.1.0)).collect(),
            heads,
            owners: self.owners,
            acts: self.acts,
            evidence: self.evidence,
            rounded: self.rounded,
        })
    }

    /// The output is laid out as (batch, tokens, classes), whatever of it is there.
    fn check_layout(&self, view: &View, e: Id, heads: &[Head]) -> Found<()> {
        let shape = self.x.shape(e);
        if shape.len() != 3 {
            return Ok(());
        }
        let full =
            [axes::axis(0, shape[0]), axes::axis(1, view.sel.map_or(shape[1], |s| s.1)), axes::axis(2, shape[2])];
        let index = heads.iter().any(|h| matches!(h, Head::ArgMax | Head::TopK));
        let want: Vec<Dim> = full.into_iter().take(if index { 2 } else { 3 }).filter(|d| !d.is_empty()).collect();
        let have: Vec<Dim> = view.dims.iter().filter(|d| d.iter().any(|g| g.axis != BROADCAST)).cloned().collect();
        // a pooled token is the batch alone
        if have == want {
            Ok(())
        } else {
            refuse(view.e, "the output is laid out otherwise than (batch, tokens, classes)")
        }
    }

    /// The mean, the maximum, or the mean of both, of a run of tokens: `(kind, first, how many, of what)`.
    fn pooled(&self, e: Id) -> Option<(Pool, usize, usize, Id)> {
        if let &Op::Pool { kind, lo, n } = self.op(e) {
            return Some((if kind == PoolKind::Mean { Pool::Avg } else { Pool::Max }, lo, n, self.arg(e)));
        }
        let (core, half) = self.x.scaled(e);
        if half != 0.5 || *self.op(core) != Op::Add {
            return None;
        }
        let &[a, b] = self.args(core) else { return None };
        let (&Op::Pool { kind: k, lo, n }, &Op::Pool { kind: l, lo: lo2, n: n2 }) = (self.op(a), self.op(b)) else {
            return None;
        };
        let both = k != l && (lo, n) == (lo2, n2) && self.arg(a) == self.arg(b);
        both.then(|| (Pool::Avgmax, lo, n, self.arg(a)))
    }

    /// Attention pooling: `y + mlp(norm(y))`, `y` the answer of a learned query.
    fn map_head(&self, e: Id) -> Option<MapHead> {
        if *self.op(e) != Op::Add || self.tokens(e) != 1 {
            return None;
        }
        let &[a, b] = self.args(e) else { return None };
        for (y, br) in [(a, b), (b, a)] {
            let (Some(mlp), Some(attn)) = (self.mlp(br), self.attention(y)) else { continue };
            let (norm, latent) = (mlp.source, attn.queries);
            if mlp.fc1.len() == 1
                && matches!(self.op(norm), Op::Norm { .. })
                && self.arg(norm) == y
                && matches!(self.op(latent), Op::Param(_))
                && attn.norms == [None, None]
            {
                return Some(MapHead { source: attn.source, sel: attn.sel, latent, norm, attn, mlp });
            }
        }
        None
    }

    fn map_tensors(&mut self, m: &MapHead, facts: &Facts) -> Found<()> {
        let Op::Param(latent) = self.op(m.latent).clone() else { return refuse(m.latent, "a query") };
        if latent.dim(0) != 1 {
            return refuse(m.latent, "a pooling query for each image");
        }
        let factor = self.scale(&m.attn)?;
        if factor != 1.0 {
            return refuse(m.attn.core, "attention pooling without a scale");
        }
        if m.attn.heads != facts.heads {
            return refuse(
                m.attn.core,
                format!("{} heads in the pooling, {} in the blocks", m.attn.heads, facts.heads),
            );
        }
        self.put(m.latent, "attn_pool", "latent", (*latent).clone())?;
        let [q, k, v] = m.attn.qkv;
        self.biased_linear(q, "attn_pool.q")?;
        self.pack(&[k, v], "attn_pool.kv")?;
        self.biased_linear(m.attn.proj, "attn_pool.proj")?;
        self.owners.insert(m.attn.core, "attn_pool".into());
        self.norm(m.norm, "attn_pool.norm", false)?;
        self.biased_linear(m.mlp.fc1[0], "attn_pool.mlp.fc1")?;
        self.biased_linear(m.mlp.fc2, "attn_pool.mlp.fc2")?;
        for (e, want) in [(m.mlp.fc1[0], facts.hidden), (m.mlp.fc2, self.width(m.attn.proj))] {
            if self.width(e) != want {
                return refuse(e, format!("the pooling's MLP is {} wide, {want} is expected", self.width(e)));
            }
        }
        self.acts.push((m.mlp.act, m.mlp.act_at));
        Ok(())
    }

    fn encoder(&mut self, blocks: &[Block]) -> Found<Facts> {
        let mut facts: Option<Facts> = None;
        for (k, pair) in blocks.chunks(2).enumerate() {
            let [first, second] = pair else {
                return refuse(pair[0].whole, format!("block {k} has one residual branch, two are expected"));
            };
            let (Branch::Attn(attn), Branch::Mlp(mlp)) = (&first.branch, &second.branch) else {
                return refuse(first.whole, format!("block {k} is not attention and then an MLP"));
            };
            let p = format!("blocks.{k}");
            self.norm(first.norm, &format!("{p}.norm1"), false)?;
            let factor = self.scale(attn)?;
            let qkv_bias = self.packed_qkv(attn, &format!("{p}.attn.qkv"), factor)?;
            self.linear(attn.proj, &format!("{p}.attn.proj"))?;
            self.owners.insert(attn.core, format!("{p}.attn"));
            match attn.norms {
                [None, None] => {}
                [Some(q), Some(k)] => {
                    for (norm, name) in [(q, "q_norm"), (k, "k_norm")] {
                        let d = self.width(norm) / attn.heads.max(1);
                        if !matches!(self.op(norm), Op::Norm { group, .. } if *group == d) {
                            return refuse(norm, "q and k are normed over all heads together");
                        }
                        self.norm(norm, &format!("{p}.attn.{name}"), true)?;
                    }
                }
                [Some(norm), None] | [None, Some(norm)] => return refuse(norm, "only one of q and k is normed"),
            }
            for (block, name) in [(first, "ls1"), (second, "ls2")] {
                if let Some(gamma) = &block.gamma {
                    let n = self.width(block.whole);
                    let flat = gamma.reshape(&[gamma.len()]).and_then(|g| g.expand(&[n]));
                    let flat = flat.ok_or(Refusal { at: Some(block.whole), why: "a LayerScale".into() })?;
                    self.put(block.whole, &format!("{p}.{name}"), "gamma", flat)?;
                }
            }
            self.norm(second.norm, &format!("{p}.norm2"), false)?;
            let (kind, hidden) = self.mlp_tensors(mlp, &p)?;
            self.acts.push((mlp.act, mlp.act_at));
            if first.gamma.is_some() != second.gamma.is_some() {
                return refuse(second.whole, format!("only one branch of block {k} has a LayerScale"));
            }
            let has_bias = |e: Id| matches!(self.op(e), Op::Linear { bias: Some(_), .. });
            let own = Facts {
                heads: attn.heads,
                hidden,
                mlp: kind,
                qkv_bias,
                proj_bias: has_bias(attn.proj),
                qk_norm: attn.norms[0].is_some(),
                layer_scale: first.gamma.is_some(),
            };
            let width = self.width(first.whole);
            if attn.qkv.iter().any(|&e| self.width(e) != width) {
                return refuse(
                    attn.core,
                    format!("heads of a total width of {} in tokens of {width}", self.width(attn.qkv[0])),
                );
            }
            match &facts {
                None => {
                    self.evidence.push((format!("num_heads = {}", attn.heads), attn.core));
                    self.evidence.push((format!("act = {:?}", mlp.act), mlp.act_at));
                    facts = Some(own);
                }
                Some(facts) if *facts == own => {}
                Some(facts) => return refuse(first.whole, format!("the blocks differ: {facts:?} and {own:?}")),
            }
        }
        facts.ok_or(Refusal { at: None, why: "no blocks".into() })
    }

    fn mlp_tensors(&mut self, mlp: &Mlp, p: &str) -> Found<(MlpKind, usize)> {
        self.biased_linear(mlp.fc2, &format!("{p}.mlp.fc2"))?;
        match mlp.fc1[..] {
            [fc1] => {
                self.biased_linear(fc1, &format!("{p}.mlp.fc1"))?;
                Ok((MlpKind::Mlp, self.width(fc1)))
            }
            [gate, up] => {
                let together = match (self.op(gate), self.op(up)) {
                    (Op::Linear { weight: g, .. }, Op::Linear { weight: u, .. }) => g.is_followed_by(u),
                    _ => false,
                };
                if together {
                    self.pack(&[gate, up], &format!("{p}.mlp.fc1"))?;
                    return Ok((MlpKind::SwigluPacked, self.width(gate) + self.width(up)));
                }
                self.biased_linear(gate, &format!("{p}.mlp.fc1_g"))?;
                self.biased_linear(up, &format!("{p}.mlp.fc1_x"))?;
                Ok((MlpKind::Swiglu, self.width(gate)))
            }
            _ => refuse(mlp.fc2, "an MLP of odd shape"),
        }
    }

    // ---------------------------------------------------------------------------------------------- embedding

    /// Prefix tokens and patches, each with its position.
    fn embedding(&self, e: Id) -> Found<Embedding> {
        let parts = if *self.op(e) == Op::Cat { self.args(e).to_vec() } else { vec![e] };
        let split = |e: Id| match self.op(e) {
            Op::AddC(c) => (self.arg(e), Some(c.clone())),
            _ => (e, None),
        };
        let Some((&last, front)) = parts.split_last() else { return refuse(e, "no tokens") };
        let (patch, pos) = split(last);
        if !matches!(self.op(patch), Op::Patch { .. }) || !matches!(self.op(self.arg(patch)), Op::Input) {
            return refuse(
                patch,
                format!("the tokens do not come from a patch embedding of the image: {}", self.x.show(patch, 3)),
            );
        }
        let mut tokens = Vec::new();
        for &part in front {
            let (param, pos) = split(part);
            let Op::Param(v) = self.op(param) else {
                return refuse(
                    param,
                    format!("a token before the patches that is no parameter: {}", self.x.show(param, 3)),
                );
            };
            if v.dim(0) != 1 {
                return refuse(param, "a token for each image of the batch");
            }
            let n = v.dim(1);
            for k in 0..n {
                let one = |a: &Array| -> Option<Array> {
                    let a = a.expand(&[1, n, self.width(e)])?;
                    a.pick(1, &Pick::range(k, 1))
                };
                let odd = || Refusal { at: Some(param), why: "a token of odd shape".into() };
                let own = one(v).ok_or_else(odd)?;
                let pos = pos.as_ref().map(|p| one(p).ok_or_else(odd)).transpose()?;
                tokens.push((param, own, pos));
            }
        }
        let pos = match pos {
            None => None,
            Some(p) => {
                let (t, c) = (self.tokens(patch), self.width(patch));
                let fits = p.rank() == 3 && p.dim(0) == 1;
                Some(
                    p.expand(&[1, t, c])
                        .filter(|_| fits)
                        .ok_or(Refusal { at: Some(last), why: "a position embedding of odd shape".into() })?,
                )
            }
        };
        Ok(Embedding { patch, at: last, prefix: tokens.len(), tokens, pos })
    }

    fn positions(&mut self, em: &Embedding, distilled: bool, no_embed_class: &mut bool) -> Found<()> {
        let failed = |why: String| Refusal { at: Some(em.at), why };
        let mut tokens: Vec<Array> = em.tokens.iter().map(|t| t.1.clone()).collect();
        let mut pos = em.pos.clone();
        let with: Vec<bool> = em.tokens.iter().map(|t| t.2.is_some()).collect();
        if let Some(table) = &mut pos {
            if with.iter().all(|&p| p) {
                let mut rows = Vec::new();
                for (k, (_, own, p)) in em.tokens.iter().enumerate() {
                    let Some(p) = p else { continue };
                    // of two parameters that are added, the one from the table of the patches is the position
                    if own.shares(table) && !p.shares(table) {
                        tokens[k] = p.clone();
                        rows.push(own.clone());
                    } else {
                        rows.push(p.clone());
                    }
                }
                rows.push(table.clone());
                *table = Array::concat(&rows, 1).map_err(failed)?;
            } else if with.iter().skip(1).all(|&p| !p) {
                *no_embed_class = true;
                if let Some((_, own, Some(p))) = em.tokens.first() {
                    // the class token alone has a position: timm adds it to the token
                    tokens[0] = own.plus(p).map_err(failed)?;
                }
            } else {
                return Err(failed("some of the tokens before the patches have a position and some have not".into()));
            }
        } else if with.iter().any(|&p| p) {
            return Err(failed("the tokens before the patches have positions, and the patches have none".into()));
        }
        if let Some((first, _, _)) = em.tokens.first() {
            self.put(*first, "", "cls_token", tokens[0].clone())?;
            self.owners.insert(*first, "cls_token".into());
        }
        if let Some((second, _, _)) = em.tokens.get(1) {
            let rest = Array::concat(&tokens[1..], 1).map_err(failed)?;
            let name = if distilled { "dist_token" } else { "reg_token" };
            self.put(*second, "", name, rest)?;
            self.owners.insert(*second, name.into());
        }
        if let Some(table) = pos {
            self.put(em.at, "", "pos_embed", table)?;
            self.owners.insert(em.at, "pos_embed".into());
        }
        Ok(())
    }

    fn raw_input(&self, _image: Id) -> bool {
        // the image is cast from integers where a raw twin of it exists
        (0..self.x.len() as Id).take(2).any(|id| *self.op(id) == Op::Raw)
    }

    /// The patch embedding. What the graph does to pixels of 8 bits is preprocessing; what it does to floats goes into
    /// the weights, because the model's input is that of the graph.
    fn patch(
        &mut self,
        e: Id,
        weight: &Constant,
        bias: Option<&Constant>,
        pixels: &[(crate::expr::Number, crate::expr::Number)],
        raw: bool,
    ) -> Found<()> {
        let module = "patch_embed.proj";
        let failed = |why: String| Refusal { at: Some(e), why };
        let (mut w, mut b) = ((**weight).clone(), bias.map(|b| (**b).clone()));
        if !pixels.is_empty() && !raw {
            let shift: Vec<f64> = pixels.iter().map(|p| p.1.0).collect();
            if shift.iter().any(|&s| s != 0.0) {
                b = Some(Array::shifted(w.clone(), shift, b).map_err(failed)?);
            }
            let scale: Vec<f64> = pixels.iter().map(|p| p.0.0).collect();
            let factors = Array::floats(DType::F64, &[1, scale.len(), 1, 1], &scale);
            w = w.times(&factors).map_err(failed)?;
            self.rounded.push("`patch_embed.proj`: takes in what the graph does to the pixels before it".into());
        }
        self.put(e, module, "weight", w)?;
        if let Some(b) = b {
            self.put(e, module, "bias", b)?;
        }
        Ok(())
    }
}

struct MapHead {
    source: Id,
    sel: Option<(usize, usize)>,
    latent: Id,
    norm: Id,
    attn: Attention,
    mlp: Mlp,
}

struct Embedding {
    patch: Id,
    at: Id,
    prefix: usize,
    /// The parameter, its token and its position.
    tokens: Vec<(Id, Array, Option<Array>)>,
    pos: Option<Array>,
}

/// What every block must share.
#[derive(Clone, Debug, PartialEq)]
struct Facts {
    heads: usize,
    hidden: usize,
    mlp: MlpKind,
    qkv_bias: bool,
    proj_bias: bool,
    qk_norm: bool,
    layer_scale: bool,
}

/// An epsilon as a person wrote it: few digits, where rounding to f32 (or 16 bits) explains the rest.
fn tidy(eps: f64, half: bool) -> f64 {
    let tolerance = if half { 2e-2 } else { 1e-6 };
    for digits in 0..4 {
        let Ok(short) = format!("{eps:.digits$e}").parse::<f64>() else { return eps };
        if (short - eps).abs() <= tolerance * eps {
            return short;
        }
    }
    eps
}

/// The expressions that a person would look at where nothing fits.
pub fn sources(x: &Exprs, e: Id) -> BTreeSet<Id> {
    let mut seen = BTreeSet::from([e]);
    let mut todo = vec![e];
    while let Some(at) = todo.pop() {
        for &arg in &x.get(at).args {
            if seen.insert(arg) {
                todo.push(arg);
            }
        }
    }
    seen
}

const EMPTY: Config = Config {
    img_size: [0; 2],
    patch_size: [0; 2],
    in_chans: 0,
    num_classes: 0,
    embed_dim: 0,
    depth: 0,
    num_heads: 0,
    mlp_hidden: 0,
    mlp: MlpKind::Mlp,
    act: Activation::Gelu,
    ln_eps: 0.0,
    patch_bias: false,
    qkv_bias: false,
    proj_bias: false,
    qk_norm: false,
    class_token: false,
    dist_token: false,
    reg_tokens: 0,
    no_embed_class: false,
    pos_embed: false,
    pre_norm: false,
    final_norm: false,
    fc_norm: false,
    layer_scale: false,
    global_pool: Pool::None,
    pre_logits: None,
    head_bias: false,
    norm: vit_model::config::NormKind::LayerNorm,
    patch_norm: false,
    scale_attn_norm: false,
    scale_mlp_norm: false,
    block: vit_model::config::BlockKind::Standard,
    pool_include_prefix: false,
    diff_attn: false,
};
