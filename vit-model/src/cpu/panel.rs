//! The plain code that packs a panel: it defines the layout, and the kernels' own packing is tested against it.

use super::shape::{Elements, Shape};

/// Packs a panel whose columns are rows of a row-major matrix with `stride` values per row.
///
/// # Safety
/// `from` is valid for reading a panel's columns as rows of `chunks` chunks, `to` for writing a panel of as many.
#[inline(always)]
pub(crate) unsafe fn pack_panel(shape: Shape, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
    let Shape { elements, cols, run, .. } = shape;
    let (size, planes) = (elements.column_bytes(), elements.planes());
    for (chunk, first) in (0..chunks).flat_map(|chunk| (0..cols).step_by(run).map(move |first| (chunk, first))) {
        // in the order of the output, because the input is in the first-level cache and the output is not
        for k in 0..16 {
            for lane in 0..run.min(cols - first) {
                // SAFETY: chunk, column and k are inside the panel and the rows that the caller's pointers are valid for
                unsafe {
                    let from = from.add((first + lane) * stride + (chunk * 16 + k) * (elements.chunk() / 16));
                    let to = to.add(chunk * cols * size + first * size / planes);
                    let at = k * run + lane;
                    match elements {
                        Elements::F32 => *to.cast::<f32>().add(at) = *from,
                        Elements::Widened => *to.cast::<u16>().add(at) = bf16(*from),
                        Elements::Bf16 | Elements::Bf16x3 => {
                            let values: [f32; 2] = *from.cast();
                            *to.cast::<[u16; 2]>().add(at) = values.map(bf16);
                            if planes == 2 {
                                let low = values.map(|x| bf16(x - f32::from_bits(u32::from(bf16(x)) << 16)));
                                *to.cast::<[u16; 2]>().add(cols * 16 + at) = low;
                            }
                        }
                        Elements::Int8 => *to.cast::<[i8; 4]>().add(at) = (*from.cast::<[f32; 4]>()).map(|x| x as i8),
                    }
                }
            }
        }
    }
}

/// Rounds a finite value to bf16, to nearest, ties to even.
#[inline(always)]
fn bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    ((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16
}
