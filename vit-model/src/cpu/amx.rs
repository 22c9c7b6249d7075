//! AMX: tiles of 16 × 32 bf16, multiplied into 16 × 16 f32; everything but the products is AVX-512's.
//!
//! The compiler has no stable intrinsics for tiles, so each instruction is a line of assembly behind [`Tiles`]. The blocking
//! above it is plain Rust, which the tests also run over emulated tiles.

use std::arch::asm;
use std::arch::x86_64::*;
use std::sync::OnceLock;

use super::avx512::{Dot, PAIRS, store_transposed};
use super::multiply::{Blocking, Entered, Multiply};
use super::product::{Epilogue, Product};
use super::registers::Ahead;
use super::shape::{Elements, Shape};
use super::tiles::Strips;

/// Rows of a tile.
const TILE: usize = 16;
/// Bytes from a row of a tile to the next, on both sides of a product.
const STRIDE: usize = 64;
/// Bytes of a tile.
const BYTES: usize = TILE * STRIDE;
/// Columns of a panel, and of the result: two tiles.
const COLS: usize = 32;

/// Proof that the CPU has AMX for bf16, and that the system lets this process use it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Amx(Dot);

impl Amx {
    /// The proof, if the CPU has it and Linux, which is asked once, permits it.
    pub(crate) fn detect() -> Option<Self> {
        static ALLOWED: OnceLock<bool> = OnceLock::new();
        let avx512 = Dot::detect()?;
        ALLOWED.get_or_init(|| has_tiles() && permitted()).then_some(Self(avx512))
    }

    /// The proof that tiles multiply bytes, too, if they do.
    pub(crate) fn bytes(self) -> Option<AmxBytes> {
        const INT8: u32 = 1 << 25;
        (__cpuid_count(7, 0).edx & INT8 == INT8).then_some(AmxBytes(self))
    }
}

/// Proof that the CPU also has AMX for bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AmxBytes(Amx);

/// Whether the CPU has tiles and their bf16 product, and the system saves them when it switches threads.
fn has_tiles() -> bool {
    const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    const TILE_STATE: u64 = 0b11 << 17;
    #[target_feature(enable = "xsave")]
    fn saved() -> u64 {
        // SAFETY: register 0 exists on every CPU with `xsave`
        unsafe { _xgetbv(0) }
    }
    if !is_x86_feature_detected!("xsave") || __cpuid_count(0, 0).eax < 7 {
        return false;
    }
    // SAFETY: the CPU has `xsave`, as was checked above
    __cpuid_count(7, 0).edx & BF16_AND_TILE == BF16_AND_TILE && unsafe { saved() } & TILE_STATE == TILE_STATE
}

/// Linux gives a process the 8 KB of tile state only when asked.
fn permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: this system call takes two numbers and accesses no memory of the process
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

/// The tile registers: 0 to 3 for sums, 4 and 5 for the left side, 6 and 7 for the right.
///
/// # Safety of every unsafe function
/// Pointers are valid for 16 rows of 64 bytes, `stride` bytes apart, and the calling thread has entered.
pub(crate) trait Tiles: Sized + 'static {
    /// Proof that the CPU has the instructions for bf16.
    type Proof: Copy + Send + Sync;
    /// Proof that it also has the product of bytes.
    type BytesProof: Copy + Send + Sync;

    /// The proof for everything but the products.
    fn vectors(proof: Self::Proof) -> Dot;
    fn floats(proof: Self::BytesProof) -> Self::Proof;
    /// Configures the calling thread's tiles.
    fn enter(proof: Self::Proof) -> Option<Entered>;
    /// The registers, in an unknown state.
    ///
    /// # Safety
    /// A proof exists.
    unsafe fn new() -> Self;
    unsafe fn zero<const T: usize>(&mut self);
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize);
    /// Loads what will not be needed again soon.
    unsafe fn load_once<const T: usize>(&mut self, from: *const u8, stride: usize);
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize);
    /// `C += A · B`
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self);
    /// `C += A · B` of unsigned bytes in `A` and signed bytes in `B`, with sums in 32 bits. Needs a `BytesProof`.
    unsafe fn dot_bytes<const C: usize, const A: usize, const B: usize>(&mut self);
    /// Prefetches a cache line for writing.
    ///
    /// # Safety
    /// A proof exists.
    unsafe fn will_write(p: *const u8);
}

/// The CPU's tiles.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Registers(());

impl Tiles for Registers {
    type Proof = Amx;
    type BytesProof = AmxBytes;

    fn vectors(proof: Amx) -> Dot {
        proof.0
    }

    fn floats(proof: AmxBytes) -> Amx {
        proof.0
    }

    fn enter(_: Amx) -> Option<Entered> {
        #[repr(C, align(64))]
        struct Configuration {
            palette: u8,
            start_row: u8,
            reserved: [u8; 14],
            row_bytes: [u16; 16],
            rows: [u8; 16],
        }
        let (mut row_bytes, mut rows) = ([0; 16], [0; 16]);
        row_bytes[..8].fill(STRIDE as u16);
        rows[..8].fill(TILE as u8);
        let configuration = Configuration { palette: 1, start_row: 0, reserved: [0; 14], row_bytes, rows };
        // SAFETY: the argument proves the instruction, which reads these 64 bytes
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const configuration, options(nostack, readonly)) };
        Some(Entered(|| {
            // SAFETY: the tiles were configured by the instruction above on the same thread
            unsafe { asm!("tilerelease", options(nostack, nomem)) };
        }))
    }

    #[inline(always)]
    unsafe fn new() -> Self {
        Self(())
    }

    #[inline(always)]
    unsafe fn zero<const T: usize>(&mut self) {
        // SAFETY: the caller has entered, which configures the tiles
        unsafe { asm!("tilezero tmm{t}", t = const T, options(nostack, nomem)) }
    }

    #[inline(always)]
    unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller has entered, and its pointer is valid for a tile
        unsafe {
            asm!("tileloadd tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) from, s = in(reg) stride, options(nostack, readonly));
        }
    }

    #[inline(always)]
    unsafe fn load_once<const T: usize>(&mut self, from: *const u8, stride: usize) {
        // SAFETY: the caller has entered, and its pointer is valid for a tile
        unsafe {
            asm!("tileloaddt1 tmm{t}, [{p} + {s}*1]", t = const T, p = in(reg) from, s = in(reg) stride, options(nostack, readonly));
        }
    }

    #[inline(always)]
    unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
        // SAFETY: the caller has entered, and its pointer is valid for a tile
        unsafe {
            asm!("tilestored [{p} + {s}*1], tmm{t}", t = const T, p = in(reg) to, s = in(reg) stride, options(nostack));
        }
    }

    #[inline(always)]
    unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller has entered, which configures the tiles
        unsafe {
            asm!("tdpbf16ps tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B, options(nostack, nomem));
        }
    }

    #[inline(always)]
    unsafe fn dot_bytes<const C: usize, const A: usize, const B: usize>(&mut self) {
        // SAFETY: the caller has entered, and has a proof of the product of bytes
        unsafe {
            asm!("tdpbusd tmm{c}, tmm{a}, tmm{b}", c = const C, a = const A, b = const B, options(nostack, nomem));
        }
    }

    #[inline(always)]
    unsafe fn will_write(p: *const u8) {
        // SAFETY: every CPU with tiles has this prefetch, which is a hint that is valid for every address
        unsafe { asm!("prefetchw [{}]", in(reg) p, options(nostack, readonly)) }
    }
}

/// Products in tiles: of bf16, or with `SPLIT` of bf16 twice, high · high + high · low + low · high.
#[derive(Debug)]
pub(crate) struct Tiled<T: Tiles, const SPLIT: bool>(T::Proof);

impl<T: Tiles, const SPLIT: bool> Tiled<T, SPLIT> {
    pub(crate) fn new(proof: T::Proof) -> Self {
        Self(proof)
    }
}

impl<T: Tiles, const SPLIT: bool> Clone for Tiled<T, SPLIT> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T: Tiles, const SPLIT: bool> Copy for Tiled<T, SPLIT> {}

impl<T: Tiles, const SPLIT: bool> Multiply for Tiled<T, SPLIT> {
    type S = Dot;
    type Attention = Self;
    const SHAPE: Shape =
        Shape { elements: if SPLIT { Elements::Bf16x3 } else { Elements::Bf16 }, tile: TILE, cols: COLS, run: TILE };
    /// 24 KB of a panel, half of the first-level cache; the sums of a block of rows take the other half.
    const DEPTH: usize = if SPLIT { 8 } else { 12 };
    /// Half of the second-level cache for rows or for sums, because results pass through it too. With fewer rows the weights
    /// would be read too often.
    const BLOCKING: Blocking = Blocking::Rows { bytes: 1150 << 10, least: 208, most: 400 };
    const QUERIES: usize = 2 * TILE;
    const FOLLOWS: bool = true;
    const STRIPS: bool = true;

    fn simd(self) -> Dot {
        T::vectors(self.0)
    }

    fn attention(self) -> Self {
        self
    }

    fn enter(self) -> Option<Entered> {
        T::enter(self.0)
    }

    unsafe fn product(self, p: &Product<'_>) {
        let mut ahead = Ahead::new(p, p.rows.div_ceil(2 * TILE) * p.chunks);
        let mut behind = Behind { follow: p.follow, next: 0, complete: 0, rows: (2 * TILE).div_ceil(p.chunks) };
        for first in (0..p.rows).step_by(2 * TILE) {
            // SAFETY: `self` proves the instructions, and the caller promises the product, whose `c` has room for whole tiles
            unsafe {
                if p.rows - first > TILE {
                    block::<T, SPLIT, true>(p, first, &mut ahead, &mut behind);
                } else {
                    block::<T, SPLIT, false>(p, first, &mut ahead, &mut behind);
                }
            }
            behind.complete = p.rows.min(first + 2 * TILE);
        }
        behind.rows = p.rows;
        // SAFETY: all rows of the product are complete
        unsafe { behind.step() };
    }

    #[inline(always)]
    unsafe fn pack_columns(self, from: *const f32, stride: usize, chunks: usize, to: *mut u8) {
        // SAFETY: the caller promises the same of these pointers
        unsafe { self.simd().pack_pairs::<SPLIT>(from, stride, chunks, to) }
    }

    #[inline(always)]
    unsafe fn pack_strip_columns(self, strips: Strips, from: *const u8, rows: usize, chunks: usize, to: *mut u8) {
        let planes = Self::SHAPE.elements.planes();
        for (chunk, plane) in (0..chunks).flat_map(|chunk| (0..planes).map(move |plane| (chunk, plane))) {
            for tile in 0..2 {
                // SAFETY: `self` proves the features; rows below `rows` are inside the caller's strips, and `to` has two tiles
                // per chunk and plane
                unsafe {
                    let from = from.add(chunk * strips.strip + plane * strips.plane);
                    let mut columns = [_mm512_setzero_si512(); TILE];
                    for (i, column) in columns.iter_mut().enumerate() {
                        if tile * TILE + i < rows {
                            *column = _mm512_loadu_si512(from.add((tile * TILE + i) * STRIDE).cast());
                        }
                    }
                    store_transposed(columns, to.add(((chunk * planes + plane) * 2 + tile) * BYTES));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_strip_rows(self, strips: Strips, from: *const u8, rows: usize, to: *mut u8) {
        // SAFETY: `self` proves the features; rows below `rows` are inside the caller's strips, and `to` has two tiles per plane
        unsafe {
            let pairs = _mm512_loadu_si512(PAIRS.as_ptr().cast());
            for plane in 0..Self::SHAPE.elements.planes() {
                let row = |i: usize| {
                    let from = from.wrapping_add(plane * strips.plane + i * STRIDE);
                    if i < rows { _mm512_loadu_si512(from.cast()) } else { _mm512_setzero_si512() }
                };
                for pair in 0..TILE {
                    let (x, y) = (row(2 * pair), row(2 * pair + 1));
                    let left = _mm512_inserti64x4::<1>(x, _mm512_castsi512_si256(y));
                    let right = _mm512_shuffle_i64x2::<0xee>(x, y);
                    let to = to.add(plane * 2 * BYTES + pair * STRIDE);
                    _mm512_storeu_si512(to.cast(), _mm512_permutexvar_epi16(pairs, left));
                    _mm512_storeu_si512(to.add(BYTES).cast(), _mm512_permutexvar_epi16(pairs, right));
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn pack_rows(self, from: *const f32, stride: usize, rows: usize, to: *mut u8) {
        // SAFETY: the caller promises the same of these pointers
        unsafe { self.simd().pack_pairs_of_rows::<SPLIT>(from, stride, rows, to) }
    }
}

/// Runs the epilogue for complete rows, a few per step, so that the vector unit works while the tiles do.
struct Behind<'a> {
    follow: Option<Epilogue<'a>>,
    next: usize,
    complete: usize,
    /// Rows per step.
    rows: usize,
}

impl Behind<'_> {
    /// # Safety
    /// The rows of the product up to `complete` are complete.
    #[inline(always)]
    unsafe fn step(&mut self) {
        if let Some(follow) = self.follow
            && self.next < self.complete
        {
            let end = self.complete.min(self.next + self.rows);
            // SAFETY: these rows are complete, and `next` makes sure that each is passed once
            unsafe { follow.run(self.next..end) };
            self.next = end;
        }
    }
}

/// Two tiles of rows (or one) times two tiles of columns, over all chunks.
///
/// # Safety
/// A proof of `T` exists, the thread has entered, and `c` has room for whole tiles of rows; otherwise what [`Product`] asks
/// for.
#[inline(always)]
unsafe fn block<T: Tiles, const SPLIT: bool, const BOTH: bool>(
    p: &Product<'_>,
    first: usize,
    ahead: &mut Ahead,
    behind: &mut Behind<'_>,
) {
    const ROW: usize = COLS * size_of::<f32>();
    const C_LINES: usize = 2 * TILE * 2;
    // SAFETY: the caller promises the instructions and the product: both tiles of rows with `chunks` chunks (with `BOTH`), a panel
    // of as many, and whole tiles of sums
    unsafe {
        let mut t = T::new();
        let (mut top, mut bottom) = (p.a_tile(first, TILE), p.a_tile(first + TILE, TILE));
        let mut b = p.b;
        let c = p.c.add(first * COLS).cast::<u8>();
        let c2 = c.wrapping_add(TILE * ROW);
        if p.accumulate {
            t.load::<0>(c, ROW);
            t.load::<1>(c.add(STRIDE), ROW);
            if BOTH {
                t.load::<2>(c2, ROW);
                t.load::<3>(c2.add(STRIDE), ROW);
            }
        } else {
            t.zero::<0>();
            t.zero::<1>();
            t.zero::<2>();
            t.zero::<3>();
        }
        // the sums of the next block, or of the first, with which the next span begins
        let c_next = if first + 2 * TILE < p.rows { c.wrapping_add(2 * TILE * ROW) } else { p.c.cast() };
        let c_step = C_LINES.div_ceil(p.chunks);
        for chunk in 0..p.chunks {
            if SPLIT {
                // low · high first, so that both high sides are in registers when the right side's low half is loaded
                t.load_once::<4>(top.add(p.a_low), STRIDE);
                t.load::<6>(b, STRIDE);
                t.dot::<0, 4, 6>();
                t.load::<7>(b.add(BYTES), STRIDE);
                t.dot::<1, 4, 7>();
                if BOTH {
                    t.load_once::<5>(bottom.add(p.a_low), STRIDE);
                    t.dot::<2, 5, 6>();
                    t.dot::<3, 5, 7>();
                }
            }
            t.load_once::<4>(top, STRIDE);
            if !SPLIT {
                t.load::<6>(b, STRIDE);
            }
            t.dot::<0, 4, 6>();
            if !SPLIT {
                t.load::<7>(b.add(BYTES), STRIDE);
            }
            t.dot::<1, 4, 7>();
            if BOTH {
                t.load_once::<5>(bottom, STRIDE);
                t.dot::<2, 5, 6>();
                t.dot::<3, 5, 7>();
            }
            ahead.step();
            behind.step();
            for line in chunk * c_step..C_LINES.min((chunk + 1) * c_step) {
                T::will_write(c_next.wrapping_add(line * STRIDE));
            }
            if SPLIT {
                t.load::<6>(b.add(2 * BYTES), STRIDE);
                t.dot::<0, 4, 6>();
                t.load::<7>(b.add(3 * BYTES), STRIDE);
                t.dot::<1, 4, 7>();
                if BOTH {
                    t.dot::<2, 5, 6>();
                    t.dot::<3, 5, 7>();
                }
            }
            top = top.wrapping_add(p.a_chunk);
            bottom = bottom.wrapping_add(p.a_chunk);
            b = b.add(if SPLIT { 4 * BYTES } else { 2 * BYTES });
        }
        t.store::<0>(c, ROW);
        t.store::<1>(c.add(STRIDE), ROW);
        if BOTH {
            t.store::<2>(c2, ROW);
            t.store::<3>(c2.add(STRIDE), ROW);
        }
    }
}

/// Tiles in plain Rust, as Intel's manual describes the instructions.
#[cfg(test)]
pub(crate) mod emulated {
    use super::{Dot, Entered, STRIDE, TILE, Tiles};

    pub(crate) struct Emulated([[[u32; 16]; TILE]; 8]);

    fn pair(x: u32) -> [f32; 2] {
        [f32::from_bits(x << 16), f32::from_bits(x & 0xffff_0000)]
    }

    impl Tiles for Emulated {
        type Proof = Dot;
        type BytesProof = Dot;

        fn vectors(proof: Dot) -> Dot {
            proof
        }

        fn floats(proof: Dot) -> Dot {
            proof
        }

        fn enter(_: Dot) -> Option<Entered> {
            None
        }

        unsafe fn new() -> Self {
            Self([[[0x7fc0_7fc0; 16]; TILE]; 8]) // NaN, so that a result shows if a register was not loaded
        }

        unsafe fn zero<const T: usize>(&mut self) {
            self.0[T] = [[0; 16]; TILE];
        }

        unsafe fn load<const T: usize>(&mut self, from: *const u8, stride: usize) {
            for (i, row) in self.0[T].iter_mut().enumerate() {
                // SAFETY: the caller's pointer is valid for this row
                *row = unsafe { from.add(i * stride).cast::<[u32; STRIDE / 4]>().read_unaligned() };
            }
        }

        unsafe fn load_once<const T: usize>(&mut self, from: *const u8, stride: usize) {
            // SAFETY: the caller promises the same of this pointer
            unsafe { self.load::<T>(from, stride) }
        }

        unsafe fn store<const T: usize>(&mut self, to: *mut u8, stride: usize) {
            for (i, row) in self.0[T].iter().enumerate() {
                // SAFETY: the caller's pointer is valid for this row
                unsafe { to.add(i * stride).cast::<[u32; STRIDE / 4]>().write_unaligned(*row) };
            }
        }

        unsafe fn dot<const C: usize, const A: usize, const B: usize>(&mut self) {
            for m in 0..TILE {
                for n in 0..16 {
                    // products are exact in f32; the CPU sums even and odd ones separately
                    let (mut even, mut odd) = (0.0, 0.0);
                    for k in 0..16 {
                        let ([a0, a1], [b0, b1]) = (pair(self.0[A][m][k]), pair(self.0[B][k][n]));
                        even += a0 * b0;
                        odd += a1 * b1;
                    }
                    let c = f32::from_bits(self.0[C][m][n]);
                    self.0[C][m][n] = (c + (even + odd)).to_bits();
                }
            }
        }

        unsafe fn dot_bytes<const C: usize, const A: usize, const B: usize>(&mut self) {
            for m in 0..TILE {
                for k in 0..16 {
                    let a = self.0[A][m][k].to_le_bytes().map(i32::from);
                    for n in 0..16 {
                        let b = self.0[B][k][n].to_le_bytes().map(|byte| i32::from(byte as i8));
                        let products: i32 = a.iter().zip(b).map(|(a, b)| a * b).sum();
                        self.0[C][m][n] = (self.0[C][m][n] as i32).wrapping_add(products) as u32;
                    }
                }
            }
        }

        unsafe fn will_write(_: *const u8) {}
    }
}
