//! Random inputs that are the same everywhere for the same seed.

/// SplitMix64 (Steele, Lea, Flood 2014).
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in (0, 1].
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1u64 << 53) as f64
    }

    /// Standard normal values (Box and Muller), as normalised pixels roughly are.
    pub fn normal(&mut self, count: usize) -> Vec<f32> {
        let mut value = || (-2.0 * self.unit().ln()).sqrt() * (std::f64::consts::TAU * self.unit()).cos();
        (0..count).map(|_| value() as f32).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_standard_normal_and_repeat() {
        let values = Random::new(1).normal(100_000);
        let mean = values.iter().sum::<f32>() / 1e5;
        let var = values.iter().map(|v| (v - mean).powi(2)).sum::<f32>() / 1e5;
        // three standard errors of 100,000 draws: 3/√n and 3·√(2/n)
        assert!(mean.abs() < 0.0095 && (var - 1.0).abs() < 0.0134, "{mean} {var}");
        assert_eq!(values[..8], Random::new(1).normal(8));
    }
}
