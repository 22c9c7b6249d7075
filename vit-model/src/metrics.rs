//! How good a classifier is on images whose class is known: accuracy, precision and recall, calibration, and whether two
//! models really differ.

use crate::labels::Prediction;
use crate::{Error, Result, memory};

/// Bins of confidence, as in Guo et al., *On Calibration of Modern Neural Networks* (arXiv 1706.04599).
const BINS: usize = 15;

/// The two-sided 95 % quantile of the normal distribution.
const Z_95: f64 = 1.959_963_984_540_054;

/// Counts predictions against the truth, one image at a time. Memory grows with the square of the number of classes, not with
/// the number of images.
///
/// ```
/// use vit_model::{Predictor, metrics::Tally};
///
/// # #[cfg(all(feature = "image", feature = "digits"))]
/// # fn main() -> vit_model::Result<()> {
/// let model = Predictor::open("digits")?;
/// let mut tally = Tally::new(10)?;
/// for truth in 0..10 {
///     let image = format!("../weights/digits/samples/{truth}.png");
///     tally.add(truth, &model.classify(image, 10)?)?;
/// }
/// println!("{:.1} % right", tally.evaluation().top1 * 100.0);
/// # Ok(())
/// # }
/// # #[cfg(not(all(feature = "image", feature = "digits")))]
/// # fn main() {}
/// ```
#[derive(Clone, Debug)]
pub struct Tally {
    confusion: Confusion,
    images: u64,
    in_top5: u64,
    log_loss: f64,
    bins: [Sums; BINS],
}

/// What fell into a bin of confidence.
#[derive(Clone, Copy, Debug, Default)]
struct Sums {
    images: u64,
    right: u64,
    confidence: f64,
}

impl Tally {
    /// Most classes that can be counted: the matrix then has 3.4 GB.
    pub const MAX_CLASSES: usize = 21_000;

    /// An empty tally of `classes` classes.
    ///
    /// # Errors
    /// [`Error::Input`] for more than [`MAX_CLASSES`](Self::MAX_CLASSES); [`Error::Memory`] for more than there is memory for.
    pub fn new(classes: usize) -> Result<Self> {
        Ok(Self {
            confusion: Confusion::new(classes)?,
            images: 0,
            in_top5: 0,
            log_loss: 0.0,
            bins: [Sums::default(); BINS],
        })
    }

    /// Counts an image of the class `truth`. `predictions` are the model's for it, the most probable first: all classes, or
    /// the log loss is infinite as soon as the true one is missing.
    ///
    /// # Errors
    /// [`Error::Input`] if there is no prediction, or a class that the tally does not have.
    pub fn add(&mut self, truth: usize, predictions: &[Prediction]) -> Result<()> {
        let best =
            predictions.first().ok_or_else(|| Error::Input("an image without predictions cannot be counted".into()))?;
        self.confusion.add(truth, best.class)?;
        let right = u64::from(best.class == truth);
        self.images += 1;
        self.in_top5 += u64::from(predictions.iter().take(5).any(|p| p.class == truth));
        let of_truth = predictions.iter().find(|p| p.class == truth).map_or(0.0, |p| f64::from(p.probability));
        // as scikit-learn clips it: to the smallest step of the type above zero
        self.log_loss -= of_truth.max(f64::from(f32::EPSILON)).ln();
        let confidence = f64::from(best.probability);
        // bins are closed above: 0.2 belongs to (0.133, 0.2]
        let bin = ((confidence * BINS as f64).ceil() as usize).clamp(1, BINS) - 1;
        if let Some(bin) = self.bins.get_mut(bin) {
            bin.images += 1;
            bin.right += right;
            bin.confidence += confidence;
        }
        Ok(())
    }

    /// What the counts amount to.
    pub fn evaluation(&self) -> Evaluation {
        let right = self.confusion.right();
        let images = self.images as f64;
        let share = |count: u64| if self.images == 0 { 0.0 } else { count as f64 / images };
        let classes = self.confusion.scores();
        let bins: Vec<Bin> = (self.bins.iter().enumerate())
            .map(|(i, sums)| {
                let mean = |sum: f64| if sums.images == 0 { 0.0 } else { sum / sums.images as f64 };
                Bin {
                    from: i as f64 / BINS as f64,
                    to: (i + 1) as f64 / BINS as f64,
                    images: sums.images,
                    confidence: mean(sums.confidence),
                    accuracy: mean(sums.right as f64),
                }
            })
            .collect();
        let ece = bins.iter().map(|bin| (bin.accuracy - bin.confidence).abs() * share(bin.images)).sum();
        Evaluation {
            images: self.images,
            top1: share(right),
            top1_interval: wilson(right, self.images),
            top5: share(self.in_top5),
            macro_average: Scores::average(&classes, |_| 1.0),
            weighted_average: Scores::average(&classes, |class| class.support as f64),
            classes,
            log_loss: if self.images == 0 { 0.0 } else { self.log_loss / images },
            calibration_error: ece,
            bins,
            confusion: self.confusion.clone(),
        }
    }
}

/// How good a classifier is. All shares are between 0 and 1.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Evaluation {
    /// Images that were counted.
    pub images: u64,
    /// The share of images whose most probable class is the right one.
    pub top1: f64,
    /// The interval that contains the accuracy with 95 % confidence, if the images are a random sample (Wilson's).
    pub top1_interval: (f64, f64),
    /// The share of images whose class is among the five most probable.
    pub top5: f64,
    /// A row for each class, in class order.
    pub classes: Vec<Scores>,
    /// The mean over the classes that occur, as the truth or as an answer.
    pub macro_average: Scores,
    /// The mean over classes, weighted with their images.
    pub weighted_average: Scores,
    /// The mean of −ln p of the true class; p is at least 1.2e-7.
    pub log_loss: f64,
    /// The expected calibration error: how far confidence is from accuracy, over 15 bins of equal width (arXiv 1706.04599).
    pub calibration_error: f64,
    /// Those bins.
    pub bins: Vec<Bin>,
    /// How often each class was taken for each.
    pub confusion: Confusion,
}

/// Precision and recall of a class. A ratio whose denominator is zero is 0, as in scikit-learn.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
#[non_exhaustive]
pub struct Scores {
    /// Of the images that the model gives this class, the share that have it.
    pub precision: f64,
    /// Of the images that have this class, the share to which the model gives it.
    pub recall: f64,
    /// The harmonic mean of both.
    pub f1: f64,
    /// Images that have this class.
    pub support: u64,
    /// Images that the model gives this class.
    pub predicted: u64,
}

impl Scores {
    fn average(classes: &[Self], weight: impl Fn(&Self) -> f64) -> Self {
        let occurs = |class: &&Self| class.support + class.predicted > 0;
        let total: f64 = classes.iter().filter(occurs).map(&weight).sum();
        let mean = |value: fn(&Self) -> f64| match total {
            0.0 => 0.0,
            total => classes.iter().filter(occurs).map(|class| value(class) * weight(class)).sum::<f64>() / total,
        };
        Self {
            precision: mean(|class| class.precision),
            recall: mean(|class| class.recall),
            f1: mean(|class| class.f1),
            support: classes.iter().map(|class| class.support).sum(),
            predicted: classes.iter().map(|class| class.predicted).sum(),
        }
    }
}

/// The images to whose best class the model gives a probability above `from` and up to `to`.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Bin {
    /// The bin's lower end, outside of it.
    pub from: f64,
    /// The bin's upper end.
    pub to: f64,
    /// Images in it.
    pub images: u64,
    /// Their mean confidence; 0 without images.
    pub confidence: f64,
    /// The share of them that is right; 0 without images.
    pub accuracy: f64,
}

/// How often the class of a row was taken for the class of a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Confusion {
    classes: usize,
    counts: Vec<u64>,
}

impl Confusion {
    fn new(classes: usize) -> Result<Self> {
        if classes > Tally::MAX_CLASSES {
            return Err(Error::Input(format!("{classes} classes, but at most {} can be counted", Tally::MAX_CLASSES)));
        }
        let cells = classes * classes;
        memory::check(cells * 8, "a confusion matrix")?;
        Ok(Self { classes, counts: vec![0; cells] })
    }

    fn add(&mut self, truth: usize, predicted: usize) -> Result<()> {
        if truth >= self.classes || predicted >= self.classes {
            let class = truth.max(predicted);
            return Err(Error::Input(format!("class {class} of {} classes, counted from 0", self.classes)));
        }
        self.counts[truth * self.classes + predicted] += 1;
        Ok(())
    }

    /// The number of classes, which is that of rows and of columns.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// How many images of the class `truth` were given the class `predicted`; 0 for a class that is not there.
    pub fn get(&self, truth: usize, predicted: usize) -> u64 {
        if predicted >= self.classes {
            return 0;
        }
        self.counts.get(truth * self.classes + predicted).copied().unwrap_or(0)
    }

    fn right(&self) -> u64 {
        (0..self.classes).map(|class| self.get(class, class)).sum()
    }

    fn scores(&self) -> Vec<Scores> {
        let mut predicted = vec![0; self.classes];
        for row in self.counts.chunks_exact(self.classes.max(1)) {
            predicted.iter_mut().zip(row).for_each(|(sum, count)| *sum += count);
        }
        let ratio = |part: u64, whole: u64| if whole == 0 { 0.0 } else { part as f64 / whole as f64 };
        let scores = |class: usize| {
            let right = self.get(class, class);
            let support = (0..self.classes).map(|p| self.get(class, p)).sum();
            Scores {
                precision: ratio(right, predicted[class]),
                recall: ratio(right, support),
                f1: ratio(2 * right, support + predicted[class]),
                support,
                predicted: predicted[class],
            }
        };
        (0..self.classes).map(scores).collect()
    }
}

/// Whether two models differ on the same images, by McNemar's exact test.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Paired {
    /// Images that only the first model gets right.
    pub only_first: u64,
    /// Images that only the second gets right.
    pub only_second: u64,
    /// The second's accuracy less the first's.
    pub difference: f64,
    /// The interval that contains the difference with 95 % confidence (Wald's, for pairs).
    pub interval: (f64, f64),
    /// How probable so one-sided a disagreement is if neither model is better.
    pub p_value: f64,
}

impl Paired {
    /// Compares two models on `images` images, of which each gets some right that the other gets wrong.
    pub fn new(images: u64, only_first: u64, only_second: u64) -> Self {
        let (n, b, c) = (images.max(1) as f64, only_first as f64, only_second as f64);
        let difference = (c - b) / n;
        let spread = Z_95 * ((b + c) - (c - b) * (c - b) / n).max(0.0).sqrt() / n;
        Self {
            only_first,
            only_second,
            difference,
            interval: (difference - spread, difference + spread),
            p_value: binomial_two_sided(only_first.min(only_second), only_first + only_second),
        }
    }
}

/// Twice the probability of at most `k` heads in `n` throws of a fair coin, at most 1.
fn binomial_two_sided(k: u64, n: u64) -> f64 {
    // the largest term in logarithms, because 2^-n underflows; the others follow by their ratio, downwards
    let ln_largest: f64 =
        (1..=k).map(|i| ((n - k + i) as f64 / i as f64).ln()).sum::<f64>() - n as f64 * std::f64::consts::LN_2;
    let (mut term, mut sum) = (1.0, 1.0);
    for i in (1..=k).rev() {
        term *= i as f64 / (n - i + 1) as f64;
        sum += term;
        if term < 1e-18 * sum {
            break;
        }
    }
    (2.0 * ln_largest.exp() * sum).min(1.0)
}

/// Wilson's interval for a share, with 95 % confidence.
fn wilson(right: u64, images: u64) -> (f64, f64) {
    if images == 0 {
        return (0.0, 1.0);
    }
    let (n, share) = (images as f64, right as f64 / images as f64);
    let square = Z_95 * Z_95;
    let centre = (share + square / (2.0 * n)) / (1.0 + square / n);
    let spread = Z_95 * (share * (1.0 - share) / n + square / (4.0 * n * n)).sqrt() / (1.0 + square / n);
    ((centre - spread).max(0.0), (centre + spread).min(1.0))
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;
    use crate::ProblemType;
    use crate::labels::predictions;

    /// Logits, classes and what scikit-learn, SciPy and statsmodels say of them; `metrics.py` beside it writes it.
    fn cases() -> Value {
        serde_json::from_str(include_str!("../../tests/fixtures/metrics/metrics.json")).unwrap()
    }

    fn near(found: f64, want: &Value, what: &str) {
        let want = want.as_f64().unwrap();
        // both sum in f64 what f32 probabilities give; the softmax of the two differs in the last digit of f32
        assert!((found - want).abs() <= 1e-6 * want.abs().max(1.0), "{what}: {found}, expected {want}");
    }

    #[test]
    fn figures_are_those_of_scikit_learn() {
        let cases = cases();
        let cases = cases["classifiers"].as_array().unwrap();
        assert!(cases.len() >= 3);
        for case in cases {
            let classes = case["classes"].as_u64().unwrap() as usize;
            let mut tally = Tally::new(classes).unwrap();
            let truths = case["truth"].as_array().unwrap();
            for (truth, logits) in truths.iter().zip(case["logits"].as_array().unwrap()) {
                let logits: Vec<f32> = logits.as_array().unwrap().iter().map(|l| l.as_f64().unwrap() as f32).collect();
                let all = predictions(ProblemType::SingleLabel, &logits, None, classes).unwrap();
                tally.add(truth.as_u64().unwrap() as usize, &all).unwrap();
            }
            let (found, want) = (tally.evaluation(), &case["want"]);
            near(found.top1, &want["top1"], "top1");
            near(found.top5, &want["top5"], "top5");
            near(found.top1_interval.0, &want["interval"][0], "interval");
            near(found.top1_interval.1, &want["interval"][1], "interval");
            near(found.log_loss, &want["log_loss"], "log loss");
            near(found.calibration_error, &want["ece"], "ECE");
            for (class, scores) in found.classes.iter().enumerate() {
                near(scores.precision, &want["precision"][class], "precision");
                near(scores.recall, &want["recall"][class], "recall");
                near(scores.f1, &want["f1"][class], "f1");
                assert_eq!(scores.support, want["support"][class].as_u64().unwrap());
                for predicted in 0..classes {
                    assert_eq!(
                        found.confusion.get(class, predicted),
                        want["confusion"][class][predicted].as_u64().unwrap()
                    );
                }
            }
            for (average, name) in [(found.macro_average, "macro"), (found.weighted_average, "weighted")] {
                near(average.precision, &want[name][0], name);
                near(average.recall, &want[name][1], name);
                near(average.f1, &want[name][2], name);
            }
        }
    }

    #[test]
    fn p_values_are_those_of_statsmodels() {
        let cases = cases();
        let cases = cases["pairs"].as_array().unwrap();
        assert!(cases.len() >= 5);
        for case in cases {
            let count = |name: &str| case[name].as_u64().unwrap();
            let paired = Paired::new(count("images"), count("only_first"), count("only_second"));
            let want = case["p_value"].as_f64().unwrap();
            assert!((paired.p_value - want).abs() <= 1e-9 * want.max(1e-300), "{}, expected {want}", paired.p_value);
            near(paired.interval.0, &case["interval"][0], "interval");
            near(paired.interval.1, &case["interval"][1], "interval");
        }
    }

    #[test]
    fn what_cannot_be_counted_is_refused() {
        let mut tally = Tally::new(2).unwrap();
        let one = predictions(ProblemType::SingleLabel, &[0.0, 1.0], None, 2).unwrap();
        assert!(tally.add(0, &[]).is_err());
        assert!(tally.add(2, &one).is_err());
        assert!(Tally::new(usize::MAX).is_err());
        assert_eq!(tally.evaluation().images, 0);
        assert_eq!(tally.evaluation().top1, 0.0);
        assert_eq!(tally.evaluation().confusion.get(0, 7), 0);
    }
}
