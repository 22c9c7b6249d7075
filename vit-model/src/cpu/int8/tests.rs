//! Layers of integers against f64, in emulation and as the CPU does them.

use proptest::prelude::*;

use super::super::amx::{self, Amx, Registers, emulated::Emulated};
use super::super::avx512::{Bf16, Dot};
use super::super::buffer::Buffer;
use super::super::copy::CopyRows;
use super::super::kernel::Kernel;
use super::super::linear::{Add, LinearJob, LinearTo};
use super::super::multiply::{Multiply as _, Widened};
use super::super::packed::Form;
use super::super::packing::pack_rows;
use super::super::scale::{Scale, WIDEST, round};
use super::super::tiles::{Acts, Rows};
use super::mixed::Mixed;
use super::tiled::Tiled;
use super::vnni::Vnni;

/// Tiles in emulation, and what the CPU has.
fn kernels() -> Vec<Box<dyn Kernel>> {
    fn tiled<T: amx::Tiles>(proof: T::BytesProof) -> Box<dyn Kernel> {
        Box::new(Mixed { floats: amx::Tiled::<T, false>::new(T::floats(proof)), integers: Tiled::<T>::new(proof) })
    }
    let mut all = Vec::new();
    all.extend(Dot::detect().map(tiled::<Emulated>));
    all.extend(Amx::detect().and_then(Amx::bytes).map(tiled::<Registers>));
    if let Some(integers) = Vnni::detect() {
        all.push(Box::new(Mixed { floats: Widened(integers.simd()), integers }));
        all.extend(Dot::detect().map(|dot| Box::new(Mixed { floats: Bf16(dot), integers }) as Box<dyn Kernel>));
    }
    all
}

/// Numbers in −1 to 1 with some large ones among them.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        let x = (self.0 >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
        if (self.0 >> 32).is_multiple_of(31) { 8.0 * x } else { x }
    }

    fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

/// A linear layer over some rows: what was multiplied, and what came of it.
struct Layer {
    /// The activations as bytes, each row with its scale.
    rounded: Vec<(Scale, Vec<u8>)>,
    y: Vec<Vec<f32>>,
}

/// `W x + b` by a kernel, of numbers `x` that bf16 has.
fn layer(kernel: &dyn Kernel, x: &[Vec<f32>], w: &[Vec<f32>], b: &[f32], gated: bool) -> Layer {
    let integers = kernel.integers().unwrap();
    let (rows, k, n, tile) = (x.len(), w[0].len(), w.len(), integers.shape().tile);
    let form = Form { n, k, gated, shape: integers.shape() };
    let linear = pack_rows(form, kernel, b, n, None, |run, out, stride| {
        for (row, out) in run.zip(out.chunks_mut(stride)) {
            out[..k].copy_from_slice(&w[row]);
        }
        Ok(())
    })
    .unwrap();
    let room = |shape| Buffer::new(Acts::bytes(shape, rows, k));
    let (wide, bytes) = (room(kernel.shape()), room(integers.shape()));
    let outputs = if gated { n / 2 } else { n };
    let from = Buffer::new(Rows::bytes(rows, k));
    let y = Buffer::new(Rows::bytes(rows, outputs));
    // SAFETY: the buffers have these bytes and outlive the views
    let (wide_rows, byte_rows, from_rows, y_rows) = unsafe {
        (
            Acts::new(wide.ptr(), kernel.shape(), rows, k),
            Acts::new(bytes.ptr(), integers.shape(), rows, k),
            Rows::new(from.ptr(), rows, k),
            Rows::new(y.ptr(), rows, outputs),
        )
    };
    for (i, x) in x.iter().enumerate() {
        // SAFETY: the view has this row of `k` values
        unsafe { from_rows.row(i).copy_from_nonoverlapping(x.as_ptr(), k) };
    }
    let job = LinearJob::new(&linear, byte_rows, rows, None, LinearTo::Rows(y_rows, Add::Nothing));
    let scratch = Buffer::new(kernel.linear_scratch());
    let _entered = kernel.enter();
    // SAFETY: no other thread has the views, and the scratch is as large as the kernel asks for
    unsafe {
        kernel.copy(CopyRows::new(from_rows, (1, 0), 0..rows, k, wide_rows));
        integers.round(wide_rows, byte_rows, 0..rows);
        (0..kernel.linear_units(&job, 2)).for_each(|unit| kernel.linear(&job, unit, 2, scratch.ptr().cast()));
    }
    let read = |row: usize, column: usize| {
        let at = byte_rows.left(row, column / 64).0.wrapping_add(row % tile * 64 + column % 64);
        // SAFETY: the buffer has the row and the column
        unsafe { *at }
    };
    Layer {
        // SAFETY: the buffers have these rows
        rounded: (0..rows)
            .map(|i| (unsafe { *byte_rows.scale(i) }, (0..k).map(|column| read(i, column)).collect()))
            .collect(),
        // SAFETY: the buffer has these rows of `outputs` values
        y: (0..rows).map(|i| unsafe { std::slice::from_raw_parts(y_rows.row(i), outputs) }.to_vec()).collect(),
    }
}

/// Rows of numbers that bf16 has, each larger than the one before.
fn matrix(numbers: &mut Numbers, rows: usize, columns: usize, scale: f32) -> Vec<Vec<f32>> {
    let mut number = |scale| half::bf16::from_f32(numbers.next() * scale).to_f32();
    (0..rows).map(|i| (0..columns).map(|_| number(scale * (1.0 + i as f32))).collect()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..Default::default() })]

    /// Against f64 of the integers, which is exact but for a few operations in f32; and against f64 of what was rounded:
    /// half a step for each value of either side, times the other side. All kernels answer the same bits.
    #[test]
    fn a_layer_is_what_its_integers_are(
        (rows, k, n, gated) in (1usize..70, 1usize..900, 1usize..40, any::<bool>()),
        size in prop_oneof![Just(1e-10f32), Just(1.0), Just(1e10)],
        seed in any::<u64>(),
    ) {
        let n = if gated { 2 * n } else { n };
        let mut numbers = Numbers(seed);
        let (x, w) = (matrix(&mut numbers, rows, k, size), matrix(&mut numbers, n, k, 1.0));
        let b: Vec<f32> = numbers.take(n).into_iter().map(|b| b * size).collect();
        let columns: Vec<(f32, Vec<f32>)> = w.iter().map(|row| {
            let mut row = row.clone();
            (round(&mut row).0, row)
        }).collect();
        let mut answers = Vec::new();
        for kernel in kernels() {
            let layer = layer(&*kernel, &x, &w, &b, gated);
            for (i, (x, (Scale { step: scale, least }, bytes))) in x.iter().zip(&layer.rounded).enumerate() {
                let (scale, zero) = (f64::from(*scale), f64::from(*least));
                for (&x, &byte) in x.iter().zip(bytes) {
                    let off = (f64::from(x) - (scale * f64::from(byte) + zero)).abs();
                    prop_assert!(off <= scale * 0.5001, "{x} became {byte} · {scale} + {zero}");
                }
                // zero is one of the ends, or between them
                let (least, most) = bytes.iter().fold((0, 0), |(least, most), &byte| {
                    let above = (f64::from(byte) + zero / scale).round() as i32;
                    (above.min(least), above.max(most))
                });
                prop_assert!((253..=255).contains(&(most - least)), "row {i} uses {least} to {most}");
                // for each output: its value from the integers, its exact value, the largest allowed difference of the two,
                // and the size of the terms
                let output = |j: usize| {
                    let (step, column) = &columns[j];
                    let step = f64::from(*step);
                    let (mut sum, mut weights, mut exact, mut bound) = (0i64, 0i64, 0f64, 0f64);
                    for ((&x, &byte), (&w, &integer)) in x.iter().zip(bytes).zip(w[j].iter().zip(column)) {
                        sum += i64::from(byte) * integer as i64;
                        weights += integer as i64;
                        exact += f64::from(x) * f64::from(w);
                        bound += f64::from(x.abs()) * step / 2.0 + f64::from(w.abs()) * scale / 2.0 + scale * step / 4.0;
                    }
                    let terms = [sum as f64 * scale * step, weights as f64 * zero * step, f64::from(b[j])];
                    (terms.iter().sum::<f64>(), exact + terms[2], bound, terms.iter().map(|x| x.abs()).sum::<f64>())
                };
                for (j, &y) in layer.y[i].iter().enumerate() {
                    let (found, (of_integers, exact, bound, size)) = (f64::from(y), output(j));
                    if gated {
                        let (value, ..) = output(layer.y[i].len() + j);
                        let (expected, size) = (of_integers * value, size * output(layer.y[i].len() + j).3);
                        prop_assert!((found - expected).abs() <= 1e-6 * size, "{found} for {expected}");
                        continue;
                    }
                    prop_assert!((found - of_integers).abs() <= 3e-7 * size, "{found} for {of_integers}");
                    prop_assert!((found - exact).abs() <= 1.001 * bound + 3e-7 * size, "{found} for {exact}");
                }
            }
            answers.push(layer.y);
        }
        prop_assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "kernels differ");
    }
}

#[test]
fn integers_are_rounded_to_nearest_ties_to_even() {
    let mut row = [127.0, 0.5, 1.5, -2.5, 3.4, -3.6, 0.0, -127.0];
    assert_eq!(round(&mut row), (1.0, -1.0));
    assert_eq!(row, [127.0, 0.0, 2.0, -2.0, 3.0, -4.0, 0.0, -127.0]);
    let expected = row.map(|x| x as i32 + 127);
    for kernel in kernels() {
        // all are numbers in bf16
        let x = vec![vec![127.0, 0.5, 1.5, -2.5, 3.40625, -3.59375, 0.0, -127.0]];
        let layer = layer(&*kernel, &x, &[vec![1.0; 8]], &[0.0], false);
        let (Scale { step, least }, bytes) = &layer.rounded[0];
        assert_eq!((*step, *least), (1.0, -127.0));
        assert_eq!(bytes.iter().map(|&byte| i32::from(byte)).collect::<Vec<_>>(), expected);
    }
}

/// Otherwise the byte of the least value would be −1, and so 255: the largest.
#[test]
fn the_least_value_of_a_row_is_rounded_as_the_kernels_do() {
    // every number that bf16 has from 1 to 4
    let number = |i: u32| f32::from_bits(1f32.to_bits() + (i << 16));
    for (low, high) in (0..256).flat_map(|low| (0..256).map(move |high| (-number(low), number(high)))) {
        let (_, inverse, off) = Scale::new(low, high);
        // exact: the product of two f32 fits f64
        let exact = (f64::from(low) * f64::from(inverse)).round_ties_even();
        assert_eq!(f64::from(off), exact, "the least of {low} to {high}");
    }
}

#[test]
fn rows_of_zeros_are_the_bias_and_rows_that_are_not_finite_no_numbers() {
    let (k, n) = (100, 40);
    let row = |at: f32| (0..k).map(|i| if i == 77 { at } else { 0.25 * (i % 5) as f32 }).collect::<Vec<f32>>();
    let x = [
        vec![0.0; k],
        row(f32::NAN),
        row(1.0),
        row(f32::INFINITY),
        vec![f32::MIN_POSITIVE; k],
        row(f32::NEG_INFINITY),
        vec![f32::NAN; k],
        vec![1e38; k],
    ];
    let b: Vec<f32> = (0..n).map(|i| i as f32 - 3.0).collect();
    for kernel in kernels() {
        let w = matrix(&mut Numbers(1), n, k, 1e-3);
        let Layer { y, .. } = layer(&*kernel, &x, &w, &b, false);
        assert_eq!((&y[0], &y[4]), (&b, &b));
        for i in [1, 3, 5, 6] {
            assert!(y[i].iter().all(|y| y.is_nan()), "row {i}: {:?}", y[i]);
        }
        assert!(y[2].iter().chain(&y[7]).all(|y| y.is_finite()));
        let zeros = layer(&*kernel, &x, &vec![vec![0.0; k]; n], &b, false).y;
        assert_eq!((&zeros[2], &zeros[7]), (&b, &b));
    }
}

#[test]
fn the_widest_sum_fits() {
    assert!(255 * 127 * WIDEST as i64 <= i64::from(i32::MAX));
    for kernel in kernels() {
        let (x, w) = (vec![vec![3.0; WIDEST]; 2], vec![vec![5.0; WIDEST], vec![-5.0; WIDEST]]);
        let y = layer(&*kernel, &x, &w, &[0.0; 2], false).y;
        let exact = 15.0 * WIDEST as f32;
        for (found, exact) in [(y[0][0], exact), (y[1][1], -exact)] {
            assert!((found / exact - 1.0).abs() < 5e-7, "{found} for {exact}");
        }
    }
}
