//! The element types that a file of another program can hold, and how those that no `Dtype` has become one that does.

use crate::weights::Dtype;

/// The type of the stored elements.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Element {
    /// One that weights have.
    Float(Dtype),
    /// An 8-bit float of four exponent bits and three of the fraction, without infinities (`float8_e4m3fn`).
    E4m3,
    /// An 8-bit float of five exponent bits and two of the fraction (`float8_e5m2`).
    E5m2,
    /// One that no weight of a Vision Transformer has, by its size in bytes: integers, booleans, complex numbers.
    Other(usize),
}

impl Element {
    /// Bytes per element.
    pub(super) fn size(self) -> usize {
        match self {
            Self::Float(dtype) => dtype.size(),
            Self::E4m3 | Self::E5m2 => 1,
            Self::Other(size) => size,
        }
    }

    /// The type that readers get, or none if the tensor cannot be a weight. Every 8-bit float is exact in f16.
    pub(super) fn dtype(self) -> Option<Dtype> {
        match self {
            Self::Float(dtype) => Some(dtype),
            Self::E4m3 | Self::E5m2 => Some(Dtype::F16),
            Self::Other(_) => None,
        }
    }

    /// The elements as readers get them.
    pub(super) fn widened(self, bytes: Vec<u8>) -> Vec<u8> {
        let to = |convert: fn(u8) -> u16| bytes.iter().flat_map(|&byte| convert(byte).to_le_bytes()).collect();
        match self {
            Self::E4m3 => to(e4m3),
            Self::E5m2 => to(|byte| u16::from(byte).wrapping_shl(8)),
            Self::Float(_) | Self::Other(_) => bytes,
        }
    }
}

/// The bits in f16 of a `float8_e4m3fn`.
fn e4m3(byte: u8) -> u16 {
    let sign = u16::from(byte & 0x80).wrapping_shl(8);
    let magnitude = byte & 0x7f;
    let bits = match magnitude {
        0x7f => 0x7e00, // NaN
        // exponents are 8 less than f16's; a subnormal is a multiple of 2^-9
        0..=7 => half::f16::from_f32(f32::from(magnitude) / 512.0).to_bits(),
        _ => u16::from(magnitude).wrapping_shl(7).wrapping_add(8 << 10),
    };
    sign | bits
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;

    #[test]
    fn eight_bit_floats_have_the_values_that_their_bits_say() {
        // the value by the definition: sign, exponent, fraction
        let value = |byte: u8, exponent_bits: u32, bias: i32| {
            let fraction_bits = 7 - exponent_bits;
            let fraction = f32::from(byte & ((1 << fraction_bits) - 1)) / f32::from(1u8 << fraction_bits);
            let exponent = i32::from((byte & 0x7f) >> fraction_bits);
            let magnitude = match exponent {
                0 => fraction * 2f32.powi(1 - bias),
                _ => (1.0 + fraction) * 2f32.powi(exponent - bias),
            };
            if byte & 0x80 == 0 { magnitude } else { -magnitude }
        };
        for byte in 0..=255u8 {
            let read = |element: Element| {
                let bytes = element.widened(vec![byte]);
                half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
            };
            if byte & 0x7f == 0x7f {
                assert!(read(Element::E4m3).is_nan());
            } else {
                assert_eq!(read(Element::E4m3), value(byte, 4, 7), "e4m3 {byte:#x}");
            }
            if byte & 0x7c == 0x7c {
                assert!(!read(Element::E5m2).is_finite());
            } else {
                assert_eq!(read(Element::E5m2), value(byte, 5, 15), "e5m2 {byte:#x}");
            }
        }
    }
}
