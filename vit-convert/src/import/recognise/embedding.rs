//! The bottom of a model: the patch embedding, the tokens before the patches, and the positions of both.

use super::finder::{Finder, Fit, Refusal, refuse};
use crate::import::array::Array;
use crate::import::axes::Pick;
use crate::import::expr::{Channels, Id, Op};
use crate::onnx::graph::DType;

/// Patches, and the tokens before them.
pub struct Embedding {
    /// The patch embedding.
    pub patch: Id,
    /// The patches with their positions.
    at: Id,
    prefix: Vec<PrefixToken>,
    /// `[1, patches, channels]`
    pub pos: Option<Array>,
}

/// A learned token before the patches.
struct PrefixToken {
    param: Id,
    token: Array,
    pos: Option<Array>,
}

/// What a patch embedding says about the image.
pub struct Patches {
    pub img_size: [usize; 2],
    pub in_chans: usize,
    pub patch_size: [usize; 2],
    pub count: usize,
    pub channels: Channels,
    /// What the graph does to a pixel before the patch embedding: `(scale, shift)` for each channel; empty for nothing.
    pub pixels: Vec<(f64, f64)>,
}

impl Embedding {
    /// Tokens before the patches.
    pub fn prefix(&self) -> usize {
        self.prefix.len()
    }
}

impl Finder<'_> {
    /// The embedding that makes `e`.
    pub fn embedding(&self, e: Id) -> Fit<Embedding> {
        let parts = if *self.op(e) == Op::Cat { self.args(e) } else { &[e][..] };
        let split = |e: Id| match self.op(e) {
            Op::AddC(c) => (self.arg(e), Some(c)),
            _ => (e, None),
        };
        let Some((&last, front)) = parts.split_last() else { return refuse(e, "no tokens") };
        let (patch, pos) = split(last);
        if !matches!(self.op(patch), Op::Patch { .. }) || !matches!(self.op(self.arg(patch)), Op::Input) {
            let found = self.x.show(patch, 3);
            return refuse(patch, format!("the tokens do not come from a patch embedding of the image: {found}"));
        }
        let mut prefix = Vec::new();
        for &part in front {
            let (param, pos) = split(part);
            let Op::Param(v) = self.op(param) else {
                let found = self.x.show(param, 3);
                return refuse(param, format!("a token before the patches that is no parameter: {found}"));
            };
            if v.dim(0) != 1 {
                return refuse(param, "a token for each image of the batch");
            }
            let n = v.dim(1);
            for k in 0..n {
                let one = |a: &Array| -> Fit<Array> {
                    let row = a.expand(&[1, n, self.width(e)]).and_then(|a| a.pick(1, &Pick::range(k, 1)));
                    row.ok_or(Refusal { at: Some(param), why: "a token of odd shape".into() })
                };
                let pos = pos.map(|p| one(p)).transpose()?;
                prefix.push(PrefixToken { param, token: one(v)?, pos });
            }
        }
        let pos = match pos {
            None => None,
            Some(p) => {
                let whole = [1, self.tokens(patch), self.width(patch)];
                let table = p.expand(&whole).filter(|_| p.rank() == 3 && p.dim(0) == 1);
                Some(table.ok_or(Refusal { at: Some(last), why: "a position embedding of odd shape".into() })?)
            }
        };
        Ok(Embedding { patch, at: last, prefix, pos })
    }

    /// Takes the tokens before the patches and the table of positions; says whether these tokens have no position of
    /// their own (timm's `no_embed_class`).
    pub fn positions(&mut self, embedding: &Embedding, distilled: bool) -> Fit<bool> {
        let failed = |why: String| Refusal { at: Some(embedding.at), why };
        let prefix = &embedding.prefix;
        let mut tokens: Vec<Array> = prefix.iter().map(|t| t.token.clone()).collect();
        let mut pos = embedding.pos.clone();
        let mut no_embed_class = false;
        if let Some(table) = &mut pos {
            if prefix.iter().all(|t| t.pos.is_some()) {
                let mut rows = Vec::new();
                for (token, PrefixToken { token: own, pos, .. }) in tokens.iter_mut().zip(prefix) {
                    let Some(p) = pos else { continue };
                    // of two parameters that are added, the one from the table of the patches is the position
                    if own.shares(table) && !p.shares(table) {
                        *token = p.clone();
                        rows.push(own.clone());
                    } else {
                        rows.push(p.clone());
                    }
                }
                rows.push(table.clone());
                *table = Array::concat(&rows, 1).map_err(failed)?;
            } else if prefix.iter().skip(1).all(|t| t.pos.is_none()) {
                no_embed_class = true;
                if let Some(PrefixToken { token: own, pos: Some(p), .. }) = prefix.first() {
                    // the class token alone has a position, which timm adds to the token
                    tokens[0] = own.plus(p).map_err(failed)?;
                }
            } else {
                return Err(failed("some of the tokens before the patches have a position and some have not".into()));
            }
        } else if prefix.iter().any(|t| t.pos.is_some()) {
            return Err(failed("the tokens before the patches have positions, and the patches have none".into()));
        }
        if let Some(first) = prefix.first() {
            self.put(first.param, "", "cls_token", tokens[0].clone())?;
            self.own(first.param, "cls_token");
        }
        if let Some(second) = prefix.get(1) {
            let rest = Array::concat(&tokens[1..], 1).map_err(failed)?;
            let name = if distilled { "dist_token" } else { "reg_token" };
            self.put(second.param, "", name, rest)?;
            self.own(second.param, name);
        }
        if let Some(table) = pos {
            self.put(embedding.at, "", "pos_embed", table)?;
            self.own(embedding.at, "pos_embed");
        }
        Ok(no_embed_class)
    }

    /// What the patch embedding says about the image.
    pub fn patches(&self, e: Id) -> Fit<Patches> {
        let Op::Patch { weight, grid, channels, pixels, .. } = self.op(e) else { return refuse(e, "patches") };
        let [c, h, w] = channels.axes().map(usize::from);
        let shape = self.x.shape(self.arg(e));
        Ok(Patches {
            img_size: [shape[h], shape[w]],
            in_chans: shape[c],
            patch_size: [weight.dim(2), weight.dim(3)],
            count: grid[0] * grid[1],
            channels: *channels,
            pixels: pixels.iter().map(|(scale, shift)| (scale.0, shift.0)).collect(),
        })
    }

    /// Takes the patch embedding. `bytes`: the graph takes pixels of 8 bits, and what it does to them is preprocessing.
    /// What it does to floats goes into the weights, because the model's input is that of the graph.
    pub fn patch(&mut self, e: Id, bytes: bool) -> Fit {
        let module = "patch_embed.proj";
        let Op::Patch { weight, bias, pixels, .. } = self.op(e) else { return refuse(e, "patches") };
        let failed = |why: String| Refusal { at: Some(e), why };
        let (mut w, mut b) = ((**weight).clone(), bias.as_ref().map(|b| (**b).clone()));
        if !pixels.is_empty() && !bytes {
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
