//! The patch embedding: a convolution whose stride is its kernel, or a linear over pixels that were cut up.

use std::sync::Arc;

use super::call::Call;
use super::product::Product;
use super::value::{Rule, Value, View, need};
use super::walk::Walk;
use crate::import::array::Array;
use crate::import::axes::{self, Digit, Dim};
use crate::import::expr::{Channels, Id, Number, Op};
use crate::onnx::graph::Attr;

impl Walk<'_> {
    /// The image, if `e` is made from it by scales and shifts alone.
    pub(super) fn pixels(&self, e: Id) -> Option<Id> {
        let mut at = e;
        for _ in 0..16 {
            match self.x.op(at) {
                Op::Input => return Some(at),
                Op::Scale(_) | Op::AddS(_) | Op::MulC(_) | Op::AddC(_) => at = self.x.arg(at, 0),
                _ => return None,
            }
        }
        None
    }

    /// The affine map between the image and `e`, for each channel.
    fn affine(&self, e: Id, layout: Channels) -> Rule<Vec<(Number, Number)>> {
        let channel = usize::from(layout.axes()[0]);
        let n = self.x.shape(e)[channel];
        let mut path = Vec::new();
        let mut at = e;
        while *self.x.op(at) != Op::Input {
            path.push(at);
            at = self.x.arg(at, 0);
        }
        if path.is_empty() {
            return Ok(Vec::new());
        }
        let per_channel = |c: &Array| -> Rule<Vec<f64>> {
            let others = (0..c.rank()).all(|k| k == channel || c.dim(k) == 1);
            need!(others, "the image is changed by a picture, not by a number for each channel");
            Ok(if c.len() == 1 { vec![c.f64s()[0]; n] } else { c.f64s() })
        };
        let mut map = vec![(1.0, 0.0); n];
        for id in path.into_iter().rev() {
            let (mul, add) = match self.x.op(id) {
                Op::Scale(s) => (vec![s.0; n], vec![0.0; n]),
                Op::AddS(s) => (vec![1.0; n], vec![s.0; n]),
                Op::MulC(c) => (per_channel(c)?, vec![0.0; n]),
                Op::AddC(c) => (vec![1.0; n], per_channel(c)?),
                _ => return Err("the image".into()),
            };
            for (m, (s, c)) in map.iter_mut().zip(mul.iter().zip(&add)) {
                *m = (m.0 * s, m.1 * s + c);
            }
        }
        Ok(map.into_iter().map(|(s, c)| (Number(s), Number(c))).collect())
    }

    /// A linear over cut-up pixels is a convolution whose stride is its kernel.
    pub(super) fn patches(
        &mut self,
        v: &View,
        summed: &Dim,
        w: &Array,
        left: Vec<Dim>,
        free: Vec<Dim>,
    ) -> Rule<Product> {
        let shape = self.x.shape(v.e).to_vec();
        let rest: Dim = axes::digits(left.iter().chain(&free));
        let mut found = None;
        for layout in [Channels::First, Channels::Last] {
            let size = |axis: u8| {
                let mut mine: Dim = summed.iter().filter(|d| d.axis == axis).copied().collect();
                mine.sort_by_key(|d| std::cmp::Reverse(d.stride));
                match join_one(&mine) {
                    Some(n) if shape[usize::from(axis)].is_multiple_of(n) => Some(n),
                    _ => None,
                }
            };
            let [c, h, w] = layout.axes();
            let channels = shape[usize::from(c)];
            if let (Some(n), Some(p), Some(q)) = (size(c), size(h), size(w))
                && n == channels
                && rest.iter().all(|d| d.axis != c)
            {
                found = Some((layout, [n, p, q]));
                // an axis of up to four positions is more likely the colours than a stripe of the image
                if layout == Channels::First && channels <= 4 {
                    break;
                }
            }
        }
        let (layout, [c, p, q]) = found.ok_or("a linear over a part of the image that is no grid of patches")?;
        let [axis_c, axis_h, axis_w] = layout.axes();
        let (gh, gw) = (shape[usize::from(axis_h)] / p, shape[usize::from(axis_w)] / q);
        let covered: usize = rest.iter().filter(|d| d.axis == axis_h || d.axis == axis_w).map(|d| d.size).product();
        need!(covered == gh * gw, "patches that do not cover the image");
        let pixels = self.affine(v.e, layout)?;
        // the weight's columns in the order (channel, row, column)
        let mut order: Vec<usize> = (0..summed.len()).collect();
        let rank = |d: &Digit| {
            if d.axis == axis_c {
                0
            } else if d.axis == axis_h {
                1
            } else {
                2
            }
        };
        order.sort_by_key(|&k| (rank(&summed[k]), std::cmp::Reverse(summed[k].stride)));
        let perm: Vec<usize> = std::iter::once(0).chain(order.iter().map(|k| k + 1)).collect();
        let n = w.dim(0);
        let weight = w.transpose(&perm).reshape(&[n, c, p, q]).ok_or("a patch weight that cannot be re-cut")?;
        let image = self.pixels(v.e).ok_or("the image")?;
        let op = Op::Patch { weight: Arc::new(weight), bias: None, grid: [gh, gw], channels: layout, pixels };
        let e = self.x.make(op, vec![image], vec![shape[0], gh * gw, n]);
        let renamed = |dims: Vec<Dim>| -> Rule<Vec<Dim>> {
            dims.into_iter()
                .map(|dim| {
                    let mut out = Dim::new();
                    for d in dim {
                        let (unit, stride) = if d.axis == axis_h {
                            (p, gw)
                        } else if d.axis == axis_w {
                            (q, 1)
                        } else {
                            (1, d.stride)
                        };
                        if d.axis == axis_h || d.axis == axis_w {
                            need!(d.stride % unit == 0, "patches that overlap");
                            out.push(Digit { axis: 1, stride: d.stride / unit * stride, size: d.size });
                        } else {
                            out.push(d);
                        }
                    }
                    Ok(axes::join(&out))
                })
                .collect()
        };
        Ok(Product { e, sel: None, batch: renamed(left)?, a: renamed(free)?, b: Vec::new() })
    }

    pub(super) fn conv(&mut self, call: &Call<'_>) -> Rule<Value> {
        let bias = if call.has(2) { Some(call.get(2).array("the bias of Conv")?.clone()) } else { None };
        let w = call.get(1).array("the weight of Conv")?.clone();
        let patch = self.patch_conv(call, call.get(0), &w)?;
        match bias {
            None => Ok(patch.into()),
            Some(b) => {
                need!(b.shape() == [w.dim(0)], "a bias of shape {:?} for {} channels", b.shape(), w.dim(0));
                let c = b.reshape(&[1, 1, b.len()]).ok_or("the bias of Conv")?;
                Ok(patch.of(self.x.add_c(patch.e, &c)?).into())
            }
        }
    }

    /// A convolution of the image whose stride is its kernel.
    pub(super) fn patch_conv(&mut self, call: &Call<'_>, image: &Value, w: &Array) -> Rule<View> {
        let v = image.view("the image")?.clone();
        let input = self
            .pixels(v.e)
            .ok_or("a convolution of something else than the image: a convolutional stem is no ViT of this family")?;
        need!(w.rank() == 4 && v.rank() == 4, "a convolution that is not two-dimensional");
        let shape = self.x.shape(v.e).to_vec();
        let layout = [Channels::First, Channels::Last].into_iter().find(|layout| {
            let [c, h, w] = layout.axes();
            v.dims.iter().zip([0, c, h, w]).all(|(d, k)| *d == axes::axis(k, shape[usize::from(k)]))
        });
        let layout = layout.ok_or("a convolution of a turned image")?;
        let [c, h, wd] = layout.axes().map(usize::from);
        let (n, kernel) = (w.dim(0), [w.dim(2), w.dim(3)]);
        let list = |name: &str, default: usize| -> Rule<Vec<usize>> {
            match call.ints(name)? {
                None => Ok(vec![default; 2]),
                Some(list) => {
                    list.iter().map(|&s| usize::try_from(s).map_err(|_| format!("{name} {list:?}"))).collect()
                }
            }
        };
        let strides = list("strides", 1)?;
        need!(strides == kernel, "a convolution with stride {strides:?} and kernel {kernel:?} is no patch embedding");
        need!(
            call.ints("pads")?.is_none_or(|p| p.iter().all(|&p| p == 0)),
            "a padded convolution is no patch embedding"
        );
        need!(
            list("dilations", 1)? == [1, 1] && call.int("group", 1)? == 1,
            "a dilated or grouped convolution is no patch embedding"
        );
        if let Some(Attr::Ints(k)) = call.node.attrs.get("kernel_shape") {
            let same = k.iter().map(|&k| usize::try_from(k).unwrap_or(0)).eq(kernel);
            need!(same, "kernel_shape {k:?} for a kernel of {kernel:?}");
        }
        let auto = call.text("auto_pad", "NOTSET")?;
        let divides = shape[h].is_multiple_of(kernel[0].max(1)) && shape[wd].is_multiple_of(kernel[1].max(1));
        need!(matches!(auto.as_str(), "NOTSET" | "VALID" | "") || divides, "a convolution padded {auto}");
        need!(w.dim(1) == shape[c], "a convolution of {} channels over {}", w.dim(1), shape[c]);
        need!(
            !w.is_empty() && kernel[0] <= shape[h] && kernel[1] <= shape[wd],
            "patches of {kernel:?} of an image of {}×{}",
            shape[h],
            shape[wd]
        );
        let grid = [shape[h] / kernel[0], shape[wd] / kernel[1]];
        let pixels = self.affine(v.e, layout)?;
        let op = Op::Patch { weight: Arc::new(w.clone()), bias: None, grid, channels: layout, pixels };
        let e = self.x.make(op, vec![input], vec![shape[0], grid[0] * grid[1], n]);
        let dims =
            vec![axes::axis(0, shape[0]), axes::axis(2, n), axes::strided(1, grid[1], grid[0]), axes::axis(1, grid[1])];
        Ok(View { e, dims, sel: None })
    }
}

/// The size of digits that together count `0..n` of an axis; 1 for none.
fn join_one(digits: &[Digit]) -> Option<usize> {
    match axes::join(digits)[..] {
        [] => Some(1),
        [Digit { stride: 1, size, .. }] => Some(size),
        _ => None,
    }
}
