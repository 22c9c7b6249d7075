//! Products: MatMul, Gemm, Einsum and convolution.

use candle_core::{Device, Tensor, WithDType};

use super::broadcast::broadcast_dims;
use super::call::{Call, one};
use super::shape::{Res, count, position, strides};
use super::value::{Data, Value, is_float};
use super::{arith, layout, reduce};

pub(super) fn run(call: &mut Call<'_>) -> Option<Res<Vec<Value>>> {
    one(match call.node.op.as_str() {
        "MatMul" => (|| {
            let (a, b) = (call.take(0)?, call.take(1)?);
            matmul(call, a, b)
        })(),
        "Gemm" => gemm(call),
        "Einsum" => einsum(call),
        "Conv" => (|| {
            let (x, w) = (call.take(0)?, call.take(1)?);
            let bias = call.opt(2).cloned();
            conv(call, &x, &w, bias.as_ref())
        })(),
        _ => return None,
    })
}

/// `batch` products of `[m, k]` and `[k, n]` (`[n, k]` where `turned`), by candle's gemm.
fn candle<T: WithDType>(a: Vec<T>, b: Vec<T>, [batch, m, k, n]: [usize; 4], turned: bool) -> Res<Vec<T>> {
    if batch * m * k * n == 0 {
        return Ok(vec![T::zero(); batch * m * n]);
    }
    let product = || -> candle_core::Result<Vec<T>> {
        let a = Tensor::from_vec(a, (batch, m, k), &Device::Cpu)?;
        let b = if turned {
            Tensor::from_vec(b, (batch, n, k), &Device::Cpu)?.transpose(1, 2)?
        } else {
            Tensor::from_vec(b, (batch, k, n), &Device::Cpu)?
        };
        a.matmul(&b)?.flatten_all()?.to_vec1()
    };
    product().map_err(|e| e.to_string())
}

/// The product of two stacks of matrices of equal depth, in their own type; integers exactly, through doubles.
fn products(call: &mut Call<'_>, a: Value, b: Value, size: [usize; 4], turned: bool) -> Res<Value> {
    let [batch, m, k, n] = size;
    call.spend(&[batch, m.max(1), k.max(1), n.max(1)])?;
    let dims = vec![batch, m, n];
    count(&dims)?;
    let dtype = a.dtype;
    if b.dtype != dtype {
        return Err(format!("its operands are {dtype:?} and {:?}, they must be of one type", b.dtype));
    }
    let b = b.like(&a);
    let a = a.like(&b);
    let data = match (a.data, b.data) {
        (Data::F32(x), Data::F32(y)) => {
            let own = |x: std::sync::Arc<Vec<f32>>| std::sync::Arc::try_unwrap(x).unwrap_or_else(|x| x.to_vec());
            Data::F32(candle(own(x), own(y), size, turned)?.into())
        }
        (Data::F64(x), Data::F64(y)) => Data::F64(candle(x.to_vec(), y.to_vec(), size, turned)?.into()),
        (Data::Int(x), Data::Int(y)) => {
            let wide = |x: &[i64]| x.iter().map(|&x| x as f64).collect::<Vec<_>>();
            let out = candle(wide(&x), wide(&y), size, turned)?;
            Data::Int(out.into_iter().map(|x| x as i64).collect::<Vec<_>>().into())
        }
        _ => return Err("needs tensors".into()),
    };
    Ok(Value { dtype, dims, data }.rounded())
}

/// NumPy's matmul.
pub(super) fn matmul(call: &mut Call<'_>, a: Value, b: Value) -> Res<Value> {
    let fail = || format!("shapes {:?} and {:?} do not multiply", a.dims, b.dims);
    if a.rank() == 0 || b.rank() == 0 {
        return Err(fail());
    }
    let mut ad = a.dims.clone();
    let mut bd = b.dims.clone();
    if a.rank() == 1 {
        ad.insert(0, 1);
    }
    if b.rank() == 1 {
        bd.push(1);
    }
    let (&[ref ab @ .., m, k], &[ref bb @ .., kb, n]) = (ad.as_slice(), bd.as_slice()) else { return Err(fail()) };
    if k != kb {
        return Err(fail());
    }
    let batch = broadcast_dims(ab, bb)?;
    let mut dims = batch.clone();
    if a.rank() > 1 {
        dims.push(m);
    }
    if b.rank() > 1 {
        dims.push(n);
    }
    let out = if bb.iter().all(|&d| d == 1) {
        // one matrix on the right: all rows of the left at once
        let rows = count(&ad[..ad.len() - 1])?;
        products(call, a, b, [1, rows, k, n], false)?
    } else {
        let a = a.with_dims(ad.clone())?.broadcast(&[&batch[..], &[m, k]].concat())?;
        let b = b.with_dims(bd.clone())?.broadcast(&[&batch[..], &[k, n]].concat())?;
        products(call, a, b, [count(&batch)?, m, k, n], false)?
    };
    out.with_dims(dims)
}

/// `[m, k] · [n, k]ᵀ` of matrices.
pub(super) fn matmul_turned(call: &mut Call<'_>, a: Value, b: Value) -> Res<Value> {
    let (&[m, k], &[n, kb]) = (a.dims.as_slice(), b.dims.as_slice()) else {
        return Err(format!("needs matrices, found {:?} and {:?}", a.dims, b.dims));
    };
    if k != kb {
        return Err(format!("{:?} and {:?} (transposed) do not multiply", a.dims, b.dims));
    }
    products(call, a, b, [1, m, k, n], true)?.with_dims(vec![m, n])
}

/// `α·A·B + β·C`; also for the fused spellings.
pub(super) fn gemm(call: &mut Call<'_>) -> Res<Value> {
    let (alpha, beta) = (call.float("alpha", 1.0)?, call.float("beta", 1.0)?);
    let (ta, tb) = (call.int("transA", 0)? != 0, call.int("transB", 0)? != 0);
    let (mut a, b) = (call.take(0)?, call.take(1)?);
    if a.rank() != 2 || b.rank() != 2 {
        return Err(format!("needs matrices, found {:?} and {:?}", a.dims, b.dims));
    }
    if !is_float(a.dtype) && (alpha, beta) != (1.0, 1.0) {
        return Err("scales integers".into());
    }
    if ta {
        a = a.permute(&[1, 0])?;
    }
    let mut out = if tb { matmul_turned(call, a, b)? } else { matmul(call, a, b)? };
    if alpha != 1.0 {
        let by = Value::scalar(out.dtype, alpha);
        out = arith::combine(out, by, "Mul")?;
    }
    if let Some(c) = call.opt(2) {
        let c = if beta == 1.0 { c.clone() } else { arith::binary(c, &Value::scalar(c.dtype, beta), "Mul")? };
        let dims = out.dims.clone();
        out = arith::combine(out, c.clone(), "Add")?;
        if out.dims != dims {
            return Err(format!("C of shape {:?} does not fit {dims:?}", c.dims));
        }
    }
    Ok(out)
}

/// Einstein sums: operands from left to right, each pair by one product.
fn einsum(call: &mut Call<'_>) -> Res<Value> {
    let equation: String = call.str("equation", "")?.chars().filter(|c| !c.is_whitespace()).collect();
    let (left, right) = match equation.split_once("->") {
        Some((l, r)) => (l.to_string(), Some(r.to_string())),
        None => (equation.clone(), None),
    };
    let terms: Vec<&str> = left.split(',').collect();
    if terms.len() != call.inputs.len() {
        return Err(format!("`{equation}` for {} inputs", call.inputs.len()));
    }
    // the axes of an ellipsis are labelled from the right by characters that no letter is
    let label = |term: &str, rank: Option<usize>, dots: usize| -> Res<Vec<char>> {
        let letters = term.replace("...", "");
        if !letters.chars().all(|c| c.is_ascii_alphabetic()) {
            return Err(format!("`{equation}` is no equation"));
        }
        let hidden = rank.map_or(dots, |r| r.saturating_sub(letters.len()));
        let dots: String = (0..hidden as u32).rev().filter_map(|i| char::from_u32(0xE000 + i)).collect();
        let all: Vec<char> = term.replace("...", &dots).chars().collect();
        if rank.is_some_and(|r| r != all.len()) {
            return Err(format!("`{term}` labels {} axes", all.len()));
        }
        Ok(all)
    };
    let mut operands = Vec::new();
    let mut dots = 0;
    for (i, term) in terms.iter().enumerate() {
        let v = call.take(i)?;
        let labels = label(term, Some(v.rank()), 0)?;
        dots = dots.max(labels.iter().filter(|c| **c as u32 >= 0xE000).count());
        operands.push((v, labels));
    }
    let output = if let Some(r) = right {
        label(&r, None, dots)?
    } else {
        // letters that occur once, in order, behind the ellipsis
        let all: Vec<char> = operands.iter().flat_map(|(_, l)| l.iter().copied()).collect();
        let mut once: Vec<char> = all
            .iter()
            .copied()
            .filter(|c| *c as u32 >= 0xE000 || all.iter().filter(|d| *d == c).count() == 1)
            .collect();
        once.sort_by_key(|c| if *c as u32 >= 0xE000 { (0, u32::MAX - *c as u32) } else { (1, *c as u32) });
        once.dedup();
        once
    };
    let mut rest = operands.into_iter();
    let (mut value, mut labels) = rest.next().ok_or("has no input")?;
    (value, labels) = diagonal(value, labels)?;
    let mut later: Vec<(Value, Vec<char>)> = rest.collect();
    while !later.is_empty() {
        let (b, bl) = later.remove(0);
        let (b, bl) = diagonal(b, bl)?;
        let keep = |c: &char| output.contains(c) || later.iter().any(|(_, l)| l.contains(c));
        (value, labels) = contract(call, (value, labels), (b, bl), &keep)?;
    }
    let gone: Vec<usize> = (0..labels.len()).filter(|&i| !output.contains(&labels[i])).collect();
    if !gone.is_empty() {
        value = reduce::reduce(&value, &gone, "Sum", false)?;
        labels.retain(|c| output.contains(c));
    }
    let perm = output.iter().map(|c| {
        labels.iter().position(|l| l == c).ok_or_else(|| format!("`{equation}` asks for an axis that no input has"))
    });
    value.permute(&perm.collect::<Res<Vec<_>>>()?)
}

/// Repeated labels of one operand: its diagonal.
fn diagonal(v: Value, labels: Vec<char>) -> Res<(Value, Vec<char>)> {
    let (mut dims, mut steps, mut names) = (vec![], vec![], vec![]);
    for ((&d, s), c) in v.dims.iter().zip(strides(&v.dims)).zip(labels) {
        match names.iter().position(|n| *n == c) {
            Some(i) if dims[i] == d => steps[i] += s,
            Some(_) => return Err(format!("a label stands for axes of two sizes in {:?}", v.dims)),
            None => {
                dims.push(d);
                steps.push(s);
                names.push(c);
            }
        }
    }
    if names.len() == v.rank() { Ok((v, names)) } else { Ok((v.strided(dims, &steps, 0)?, names)) }
}

type Labelled = (Value, Vec<char>);

fn contract(call: &mut Call<'_>, a: Labelled, b: Labelled, keep: &dyn Fn(&char) -> bool) -> Res<Labelled> {
    let sum_alone = |(v, l): Labelled, other: &[char]| -> Res<Labelled> {
        let gone: Vec<usize> = (0..l.len()).filter(|&i| !other.contains(&l[i]) && !keep(&l[i])).collect();
        if gone.is_empty() {
            return Ok((v, l));
        }
        let left = (0..l.len()).filter(|i| !gone.contains(i)).map(|i| l[i]).collect();
        Ok((reduce::reduce(&v, &gone, "Sum", false)?, left))
    };
    let (a, al) = sum_alone(a, &b.1)?;
    let (b, bl) = sum_alone(b, &al)?;
    let of = |l: &[char], c: char| l.iter().position(|x| *x == c);
    let shared: Vec<char> = al.iter().copied().filter(|c| bl.contains(c)).collect();
    for &c in &shared {
        let (x, y) = (of(&al, c).map(|i| a.dims[i]), of(&bl, c).map(|i| b.dims[i]));
        if x != y {
            return Err(format!("shapes {:?} and {:?} differ along a shared label", a.dims, b.dims));
        }
    }
    let (batch, inner): (Vec<char>, Vec<char>) = shared.into_iter().partition(|c| keep(c));
    let afree: Vec<char> = al.iter().copied().filter(|c| !bl.contains(c)).collect();
    let bfree: Vec<char> = bl.iter().copied().filter(|c| !al.contains(c)).collect();
    let size = |v: &Value, l: &[char], names: &[char]| -> Vec<usize> {
        names.iter().filter_map(|c| of(l, *c)).map(|i| v.dims[i]).collect()
    };
    let (bd, kd, md, nd) = (size(&a, &al, &batch), size(&a, &al, &inner), size(&a, &al, &afree), size(&b, &bl, &bfree));
    let order =
        |l: &[char], names: &[&[char]]| -> Vec<usize> { names.concat().iter().filter_map(|c| of(l, *c)).collect() };
    let shape = [count(&bd)?, count(&md)?, count(&kd)?, count(&nd)?];
    let a = a.permute(&order(&al, &[&batch, &afree, &inner]))?;
    let b = b.permute(&order(&bl, &[&batch, &inner, &bfree]))?;
    let out = products(call, a, b, shape, false)?.with_dims([bd, md, nd].concat())?;
    Ok((out, [batch, afree, bfree].concat()))
}

/// Where a sliding window reads.
struct Window {
    input: Vec<usize>,
    kernel: Vec<usize>,
    stride: Vec<usize>,
    dilation: Vec<usize>,
    before: Vec<i64>,
    out: Vec<usize>,
}

impl Window {
    fn new(call: &Call<'_>, input: &[usize], kernel: Vec<usize>) -> Res<Self> {
        let n = input.len();
        let positive = |name: &str| -> Res<Vec<usize>> {
            let Some(list) = call.ints(name)? else { return Ok(vec![1; n]) };
            let list: Vec<usize> =
                list.iter().filter_map(|&x| usize::try_from(x).ok().filter(|&x| x > 0 && x < 1 << 24)).collect();
            if list.len() == n { Ok(list) } else { Err(format!("`{name}` needs {n} positive numbers")) }
        };
        let (stride, dilation) = (positive("strides")?, positive("dilations")?);
        if kernel.len() != n || kernel.contains(&0) {
            return Err(format!("a kernel of {kernel:?} over {input:?}"));
        }
        let pads = call.ints("pads")?.unwrap_or_else(|| vec![0; 2 * n]);
        if pads.len() != 2 * n || pads.iter().any(|p| !(0..1 << 24).contains(p)) {
            return Err(format!("pads {pads:?}"));
        }
        let auto = call.str("auto_pad", "NOTSET")?;
        let (mut before, mut out) = (vec![], vec![]);
        for i in 0..n {
            let reach = (kernel[i] - 1)
                .checked_mul(dilation[i])
                .and_then(|r| r.checked_add(1))
                .ok_or("the kernel is too large")?;
            let (first, total) = match auto.as_str() {
                "NOTSET" => (pads[i], pads[i] + pads[i + n]),
                "VALID" => (0, 0),
                "SAME_UPPER" | "SAME_LOWER" => {
                    let total =
                        ((input[i].div_ceil(stride[i]).max(1) - 1) * stride[i] + reach).saturating_sub(input[i]) as i64;
                    (if auto == "SAME_UPPER" { total / 2 } else { total - total / 2 }, total)
                }
                _ => return Err(format!("auto_pad `{auto}`")),
            };
            let room = (input[i] + total as usize)
                .checked_sub(reach)
                .ok_or_else(|| format!("a kernel of {kernel:?} over {input:?}"))?;
            before.push(first);
            out.push(room / stride[i] + 1);
        }
        Ok(Self { input: input.to_vec(), kernel, stride, dilation, before, out })
    }

    /// The place in the image that place `k` of the window reads for output `o`; `None` in the padding.
    fn at(&self, mut o: usize, mut k: usize) -> Option<usize> {
        let (mut place, mut step) = (0, 1);
        for i in (0..self.input.len()).rev() {
            let x = (o % self.out[i] * self.stride[i] + k % self.kernel[i] * self.dilation[i]) as i64 - self.before[i];
            o /= self.out[i];
            k /= self.kernel[i];
            if !(0..self.input[i] as i64).contains(&x) {
                return None;
            }
            place += x as usize * step;
            step *= self.input[i];
        }
        Some(place)
    }
}

/// A convolution: windows unrolled to rows, then one product per group.
pub(super) fn conv(call: &mut Call<'_>, x: &Value, w: &Value, bias: Option<&Value>) -> Res<Value> {
    let (&[n, c, ref space @ ..], &[m, wc, ref kernel @ ..]) = (x.dims.as_slice(), w.dims.as_slice()) else {
        return Err(format!("shapes {:?} and {:?}", x.dims, w.dims));
    };
    let group = usize::try_from(call.int("group", 1)?).ok().filter(|&g| g > 0).ok_or("group must be positive")?;
    if let Some(k) = call.ints("kernel_shape")?
        && k.iter().map(|&k| k as usize).collect::<Vec<_>>() != kernel
    {
        return Err(format!("kernel_shape {k:?}, but W has shape {:?}", w.dims));
    }
    if wc.checked_mul(group) != Some(c) || m % group != 0 || space.is_empty() {
        return Err(format!("W of shape {:?} in {group} groups does not fit {:?}", w.dims, x.dims));
    }
    if x.dtype != w.dtype || bias.is_some_and(|b| b.dtype != x.dtype || b.dims != [m]) {
        return Err(format!("X is {:?}, W {:?}, B {:?}", x.dtype, w.dtype, bias.map(|b| (b.dtype, &b.dims))));
    }
    let window = Window::new(call, space, kernel.to_vec())?;
    let (image, k, places) = (count(space)?, count(kernel)?, count(&window.out)?);
    let padding = x.len();
    let zero = Value::reals(x.dtype, vec![1], vec![0.0]);
    let flat = layout::concat(&[x.clone().with_dims(vec![x.len()])?, zero], 0)?;
    let mut parts = Vec::with_capacity(group);
    let (cg, mg) = (c / group, m / group);
    for g in 0..group {
        let row = cg * k;
        let rows = flat.pick(vec![n * places, row], &|i| {
            let (r, j) = (i / row, i % row);
            let channel = r / places * c + g * cg + j / k;
            window.at(r % places, j % k).map_or(padding, |p| channel * image + p)
        })?;
        let weight = layout::narrow(w, 0, g * mg, mg)?.with_dims(vec![mg, row])?;
        let out = matmul_turned(call, rows, weight)?; // [n·places, mg]
        parts.push(out.with_dims(vec![n, places, mg])?);
    }
    let out = if parts.len() == 1 { parts.remove(0) } else { layout::concat(&parts, 2)? };
    let out = reduce::plus(out, bias)?; // [n, places, m]
    out.permute(&[0, 2, 1])?.with_dims([&[n, m], &window.out[..]].concat())
}

/// Swaps two axes.
pub(super) fn swap(v: &Value, a: i64, b: i64) -> Res<Value> {
    let mut perm: Vec<usize> = (0..v.rank()).collect();
    perm.swap(position(a, v.rank())?, position(b, v.rank())?);
    v.permute(&perm)
}
