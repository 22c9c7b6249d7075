//! Short names for popular checkpoints.

use super::RepoId;
use crate::Result;

/// A checkpoint with a short name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Known {
    /// The short name, for example `vit-base`.
    pub name: &'static str,
    /// The repository on the Hub.
    pub repository: &'static str,
    /// What it is for, and its size.
    pub about: &'static str,
}

/// A checkpoint for each size of each family whose format this project tests.
pub const KNOWN: [Known; 21] = [
    known("vit-tiny", "timm/vit_tiny_patch16_224.augreg_in21k_ft_in1k", "1000 classes, 6 M parameters"),
    known("vit-small", "timm/vit_small_patch16_224.augreg_in21k_ft_in1k", "1000 classes, 22 M"),
    known("vit-base", "timm/vit_base_patch16_224.augreg2_in21k_ft_in1k", "1000 classes, 87 M"),
    known("vit-large", "timm/vit_large_patch16_224.augreg_in21k_ft_in1k", "1000 classes, 304 M"),
    known("vit-base-google", "google/vit-base-patch16-224", "1000 classes, 87 M, transformers' format"),
    known("vit-base-in21k", "timm/vit_base_patch16_224.augreg_in21k", "21843 classes, 103 M, to fine-tune"),
    known("deit-tiny", "timm/deit_tiny_patch16_224.fb_in1k", "1000 classes, 6 M"),
    known("deit-small", "timm/deit_small_patch16_224.fb_in1k", "1000 classes, 22 M"),
    known("deit-base-distilled", "facebook/deit-base-distilled-patch16-224", "1000 classes, 87 M, two heads"),
    known("deit3-base", "timm/deit3_base_patch16_224.fb_in22k_ft_in1k", "1000 classes, 87 M"),
    known("dinov2-small", "timm/vit_small_patch14_dinov2.lvd142m", "features, 22 M, 518 px"),
    known("dinov2-base", "timm/vit_base_patch14_dinov2.lvd142m", "features, 87 M, 518 px"),
    known("dinov2-base-hf", "facebook/dinov2-base", "features, 87 M, transformers' format"),
    known("dinov2-reg-base", "timm/vit_base_patch14_reg4_dinov2.lvd142m", "features with clean attention maps, 87 M"),
    known("dinov2-reg-small-hf", "facebook/dinov2-with-registers-small", "features with clean attention maps, 22 M"),
    known("clip-base32", "openai/clip-vit-base-patch32", "CLIP, images and texts, 151 M"),
    known("clip-base16", "openai/clip-vit-base-patch16", "CLIP, images and texts, 150 M"),
    known("siglip-base", "google/siglip-base-patch16-224", "SigLIP, images and texts, 203 M"),
    known("siglip-so400m", "google/siglip-so400m-patch14-384", "SigLIP, images and texts, 878 M, 384 px"),
    known("siglip2-base", "google/siglip2-base-patch16-224", "SigLIP 2, images and texts in many languages, 375 M"),
    known("mae-base", "facebook/vit-mae-base", "MAE's encoder, features to fine-tune, 86 M"),
];

const fn known(name: &'static str, repository: &'static str, about: &'static str) -> Known {
    Known { name, repository, about }
}

impl RepoId {
    /// Parses a short name of [`KNOWN`] or a repository id.
    ///
    /// # Errors
    /// If `name` is neither.
    pub fn named(name: &str) -> Result<Self> {
        KNOWN.iter().find(|known| known.name == name).map_or(name, |known| known.repository).parse()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn every_short_name_stands_for_one_repository() {
        for known in KNOWN {
            assert_eq!(RepoId::named(known.name).unwrap().name(), known.repository);
            assert!(!known.name.contains('/'), "{} could be a repository id", known.name);
            assert_eq!(KNOWN.iter().filter(|other| other.name == known.name).count(), 1, "{}", known.name);
        }
        assert!(RepoId::named("vit-bas").is_err());
    }
}
