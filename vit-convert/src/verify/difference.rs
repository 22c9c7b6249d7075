//! How far two computations are apart.

/// How far an output is from an answer.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    /// Largest absolute difference.
    pub abs: f64,
    /// The same, divided by the output's largest magnitude.
    pub rel: f64,
}

impl Difference {
    /// Is it within a tolerance? NaN never is.
    pub fn within(self, tolerance: f64) -> bool {
        self.rel <= tolerance
    }

    pub fn between(graph: &[f64], model: &[f64]) -> Self {
        let scale = graph.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        let abs = graph.iter().zip(model).fold(0.0, |m: f64, (a, b)| {
            let d = (a - b).abs();
            if m.is_nan() || d.is_nan() { f64::NAN } else { m.max(d) }
        });
        Self { abs, rel: abs / scale }
    }
}

/// Two digits: `2.4e-6`.
pub fn short(x: f64) -> String {
    format!("{x:.1e}")
}
