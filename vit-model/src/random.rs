//! Random numbers that are the same on every machine: for tests and for the inputs of benchmarks and proofs.

/// SplitMix64 (Steele, Lea and Flood 2014); the field is the seed.
pub struct SplitMix64(pub u64);

impl SplitMix64 {
    /// 64 random bits.
    pub fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1).
    pub fn uniform(&mut self) -> f64 {
        ((self.bits() >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    }

    /// A number below `n`; 0 if `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.bits() % n.max(1) as u64) as usize
    }

    /// One element of a list, unless it is empty.
    pub fn pick<'a, T>(&mut self, list: &'a [T]) -> Option<&'a T> {
        if list.is_empty() { None } else { list.get(self.below(list.len())) }
    }

    /// Standard normal values (Box and Muller), as normalised pixels roughly are.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        // uniform in (0, 1], because the logarithm of 0 is infinite
        let mut unit = || ((self.bits() >> 11) + 1) as f64 / (1u64 << 53) as f64;
        let mut value = || (-2.0 * unit().ln()).sqrt() * (std::f64::consts::TAU * unit()).cos();
        (0..count).map(|_| value() as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::SplitMix64;

    #[test]
    fn the_bits_are_those_of_the_publication() {
        let mut random = SplitMix64(1);
        assert_eq!([random.bits(), random.bits()], [0x910A_2DEC_8902_5CC1, 0xBEEB_8DA1_658E_EC67]);
    }

    #[test]
    fn values_are_standard_normal_and_repeat() {
        let values = SplitMix64(1).normal(100_000);
        let mean = values.iter().sum::<f32>() / 1e5;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e5;
        // three standard errors of 100,000 draws: 3/√n and 3·√(2/n)
        assert!(mean.abs() < 0.0095 && (var - 1.0).abs() < 0.0134, "{mean} {var}");
        assert_eq!(values[..8], SplitMix64(1).normal(8));
    }
}
