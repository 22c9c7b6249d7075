//! pos_embed
