//! One transfer between guest memory and the image, in as many steps as it takes.
#![expect(unsafe_code, reason = "views an aligned allocation as bytes")]

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use colo::vhost_user::Chain;
use io_uring::{opcode, squeue, types};

use crate::image::{Access, Image};
use crate::request::Extent;

/// The kernel takes no more in one call (limits.h, UIO_MAXIOV).
const IOVECS_MAX: usize = 1024;

/// A step that comes back so often without having moved anything has failed: there are file systems that say EAGAIN for
/// ever.
const AGAIN_MAX: u32 = 100;

/// Zeros, for disks that cannot make them.
#[repr(align(4096))]
struct Zeros([u8; 64 << 10]);
static ZEROS: Zeros = Zeros([0; 64 << 10]);

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Read,
    Write,
    Sync,
    Discard,
    /// Zeros by the file system, and what is done where it cannot.
    Zero,
    WriteZeros,
}

/// Memory at an address that a disk takes.
struct Aligned {
    blocks: Vec<Block>,
    bytes: usize,
}

#[derive(Clone)]
#[repr(align(4096))]
struct Block(#[expect(dead_code, reason = "seen as bytes only")] [u8; 4096]);

impl Aligned {
    fn new(bytes: usize) -> Self {
        Self { blocks: vec![Block([0; 4096]); bytes.div_ceil(4096)], bytes }
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: the blocks are one allocation of at least so many bytes, all of them initialised, without padding.
        unsafe { std::slice::from_raw_parts(self.blocks.as_ptr().cast(), self.bytes) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and borrowed for ourselves alone.
        unsafe { std::slice::from_raw_parts_mut(self.blocks.as_mut_ptr().cast(), self.bytes) }
    }
}

/// Where the bytes of a transfer are, besides in the guest's memory.
enum Data {
    /// Nowhere else.
    Guest,
    /// In a copy that the peer gets as well.
    Copy(Arc<Vec<u8>>),
    /// In a copy because the guest's buffers are not aligned as the disk needs them.
    Bounce(Aligned),
}

/// A transfer. The iovecs point into the chain's guest memory or into `data`: both stay until the kernel is done.
pub(crate) struct Transfer {
    kind: Kind,
    /// Every write is to be durable when it is done.
    through: bool,
    pub(crate) chain: Chain,
    data: Data,
    iovecs: Vec<libc::iovec>,
    /// The first of `iovecs` that is not done.
    next: usize,
    /// Where in the image it goes on, and how much is left.
    offset: u64,
    left_bytes: u64,
    extents: Vec<Extent>,
    /// The first of `extents` that has not begun.
    next_extent: usize,
    /// How often the present step had to be repeated.
    again: u32,
}

/// How a transfer goes on after a step.
pub(crate) enum Next {
    /// The same way.
    Step,
    Ended(io::Result<()>),
}

impl Transfer {
    pub(crate) fn new() -> Self {
        Self {
            kind: Kind::Sync,
            through: false,
            chain: Chain::new(),
            data: Data::Guest,
            iovecs: Vec::new(),
            next: 0,
            offset: 0,
            left_bytes: 0,
            extents: Vec::new(),
            next_extent: 0,
            again: 0,
        }
    }

    fn begin(&mut self, kind: Kind, chain: &mut Chain, through: bool) {
        std::mem::swap(&mut self.chain, chain);
        (self.kind, self.through) = (kind, through);
        self.iovecs.clear();
        self.next = 0;
        self.left_bytes = 0;
        self.again = 0;
    }

    /// To read from the image at `offset` into the chain's writable part. Returns whether the data has to be copied.
    pub(crate) fn read(&mut self, chain: &mut Chain, image: &Image, offset: u64) -> bool {
        self.begin(Kind::Read, chain, false);
        self.offset = offset;
        self.left_bytes = self.chain.writable_bytes().into();
        add_pieces(&mut self.iovecs, self.chain.writable());
        let bounce = !aligned(&self.iovecs, image.access());
        if bounce {
            self.bounce(Aligned::new(self.chain.writable_bytes() as usize));
        }
        bounce
    }

    /// To write the chain's readable part to the image at `offset`. Returns whether the data had to be copied.
    pub(crate) fn write(&mut self, chain: &mut Chain, image: &Image, offset: u64, through: bool) -> bool {
        self.begin(Kind::Write, chain, through);
        self.offset = offset;
        self.left_bytes = self.chain.readable_bytes().into();
        add_pieces(&mut self.iovecs, self.chain.readable());
        let bounce = !aligned(&self.iovecs, image.access());
        if bounce {
            let mut copy = Aligned::new(self.chain.readable_bytes() as usize);
            self.chain.copy_to(copy.bytes_mut());
            self.bounce(copy);
        }
        bounce
    }

    /// To write a copy that the guest cannot change.
    pub(crate) fn write_copy(
        &mut self,
        chain: &mut Chain,
        image: &Image,
        data: Arc<Vec<u8>>,
        offset: u64,
        through: bool,
    ) {
        self.begin(Kind::Write, chain, through);
        self.offset = offset;
        self.left_bytes = data.len() as u64;
        self.iovecs.push(iovec(&data));
        if aligned(&self.iovecs, image.access()) {
            self.data = Data::Copy(data);
        } else {
            let mut copy = Aligned::new(data.len());
            copy.bytes_mut().copy_from_slice(&data);
            self.bounce(copy);
        }
    }

    /// To make all writes that have ended durable.
    pub(crate) fn sync(&mut self, chain: &mut Chain) {
        self.begin(Kind::Sync, chain, false);
    }

    /// To discard the extents, or to make them zeros.
    pub(crate) fn clear(&mut self, kind: Kind, chain: &mut Chain, extents: &[Extent], through: bool) {
        self.begin(kind, chain, through);
        self.extents.clear();
        self.extents.extend_from_slice(extents);
        self.next_extent = 0;
        self.take_extent();
    }

    fn take_extent(&mut self) -> bool {
        let Some(extent) = self.extents.get(self.next_extent) else {
            return false;
        };
        (self.offset, self.left_bytes) = (extent.offset, extent.bytes);
        self.again = 0;
        self.next_extent += 1;
        true
    }

    fn bounce(&mut self, mut copy: Aligned) {
        self.iovecs.clear();
        let bytes = copy.bytes_mut();
        self.iovecs.push(libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() });
        self.data = Data::Bounce(copy);
    }

    pub(crate) fn kind(&self) -> Kind {
        self.kind
    }

    /// Bytes of memory of ours that it holds.
    pub(crate) fn copied_bytes(&self) -> usize {
        match &self.data {
            Data::Guest => 0,
            Data::Copy(copy) => copy.len(),
            Data::Bounce(copy) => copy.bytes,
        }
    }

    /// What is left of a read or a write.
    pub(crate) fn rest(&self) -> (&[libc::iovec], u64, u64) {
        (&self.iovecs[self.next.min(self.iovecs.len())..], self.offset, self.left_bytes)
    }

    /// What the kernel is to do next.
    pub(crate) fn entry(&self, image: &Image) -> squeue::Entry {
        let entry = self.step(image);
        // at once to a helper thread, where trying first would make the worker wait
        if image.never_waits() { entry } else { entry.flags(squeue::Flags::ASYNC) }
    }

    fn step(&self, image: &Image) -> squeue::Entry {
        let file = types::Fd(image.file().as_raw_fd());
        let (iovecs, offset, left) = self.rest();
        let count = iovecs.len().min(IOVECS_MAX) as u32;
        let flags = if self.through { libc::RWF_DSYNC } else { 0 };
        match (self.kind, iovecs) {
            (Kind::Read, [one]) => {
                opcode::Read::new(file, one.iov_base.cast(), one.iov_len as u32).offset(offset).build()
            }
            (Kind::Read, _) => opcode::Readv::new(file, iovecs.as_ptr(), count).offset(offset).build(),
            (Kind::Write, [one]) => opcode::Write::new(file, one.iov_base.cast(), one.iov_len as u32)
                .offset(offset)
                .rw_flags(flags)
                .build(),
            (Kind::Write, _) => {
                opcode::Writev::new(file, iovecs.as_ptr(), count).offset(offset).rw_flags(flags).build()
            }
            (Kind::Sync, _) => opcode::Fsync::new(file).flags(types::FsyncFlags::DATASYNC).build(),
            (Kind::Discard, _) => {
                opcode::Fallocate::new(file, left).offset(offset).mode(image.discard_mode()).build()
            }
            (Kind::Zero, _) => {
                let unmap = self.next_extent > 0 && self.extents[self.next_extent - 1].unmap;
                opcode::Fallocate::new(file, left).offset(offset).mode(image.zero_mode(unmap)).build()
            }
            (Kind::WriteZeros, _) => {
                let bytes = left.min(ZEROS.0.len() as u64) as u32;
                opcode::Write::new(file, ZEROS.0.as_ptr(), bytes).offset(offset).rw_flags(flags).build()
            }
        }
    }

    /// The kernel has ended a step with `result`.
    pub(crate) fn stepped(&mut self, result: i32) -> Next {
        let unsupported = [-libc::EOPNOTSUPP, -libc::EINVAL, -libc::ENOSYS, -libc::ENODEV].contains(&result);
        match (self.kind, result) {
            (_, again) if (again == -libc::EINTR || again == -libc::EAGAIN) && self.again < AGAIN_MAX => {
                self.again += 1;
                Next::Step
            }
            // a hint (virtio 1.2 §5.2.6): a disk that cannot, need not
            (Kind::Discard, _) if unsupported => Next::Ended(Ok(())),
            (Kind::Zero, _) if unsupported => {
                self.kind = Kind::WriteZeros;
                Next::Step
            }
            (_, error) if error < 0 => Next::Ended(Err(io::Error::from_raw_os_error(-error))),
            (Kind::Sync, _) => Next::Ended(Ok(())),
            (Kind::Discard | Kind::Zero, _) => self.cleared(),
            (_, 0) => Next::Ended(Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "The disk's file is shorter than it was",
            ))),
            (Kind::WriteZeros, bytes) => {
                self.again = 0;
                self.offset += bytes as u64;
                self.left_bytes = self.left_bytes.saturating_sub(bytes as u64);
                if self.left_bytes > 0 { Next::Step } else { self.cleared() }
            }
            (Kind::Read | Kind::Write, bytes) => {
                self.advance(bytes as usize);
                if self.left_bytes > 0 { Next::Step } else { Next::Ended(Ok(())) }
            }
        }
    }

    /// An extent is done.
    fn cleared(&mut self) -> Next {
        if self.take_extent() {
            if self.kind == Kind::WriteZeros {
                self.kind = Kind::Zero;
            }
            return Next::Step;
        }
        if self.through {
            // fallocate has no way to say it
            self.kind = Kind::Sync;
            return Next::Step;
        }
        Next::Ended(Ok(()))
    }

    /// After `bytes` were transferred.
    fn advance(&mut self, mut bytes: usize) {
        self.again = 0;
        self.offset += bytes as u64;
        self.left_bytes = self.left_bytes.saturating_sub(bytes as u64);
        while bytes > 0 && self.next < self.iovecs.len() {
            let iovec = &mut self.iovecs[self.next];
            let step = bytes.min(iovec.iov_len);
            iovec.iov_base = iovec.iov_base.wrapping_byte_add(step);
            iovec.iov_len -= step;
            bytes -= step;
            if iovec.iov_len == 0 {
                self.next += 1;
            }
        }
    }

    /// It has ended: brings what was read where the guest looks for it, marks that in the dirty logs, and lets copies go.
    pub(crate) fn finish(&mut self) {
        let data = std::mem::replace(&mut self.data, Data::Guest);
        match data {
            Data::Bounce(copy) if self.kind == Kind::Read => {
                self.chain.fill(&[copy.bytes()]);
            }
            // also after an error: some of it may have been written
            _ if self.kind == Kind::Read => self.chain.mark_written(),
            _ => {}
        }
    }
}

fn add_pieces(iovecs: &mut Vec<libc::iovec>, pieces: &[colo::memory::Piece]) {
    iovecs.extend(
        pieces
            .iter()
            .map(|piece| libc::iovec { iov_base: piece.host().cast(), iov_len: piece.bytes() as usize }),
    );
}

fn iovec(bytes: &[u8]) -> libc::iovec {
    // a write only reads it
    libc::iovec { iov_base: bytes.as_ptr().cast_mut().cast(), iov_len: bytes.len() }
}

/// Whether a disk with this access takes these buffers.
fn aligned(iovecs: &[libc::iovec], access: Access) -> bool {
    let Access::Direct { memory_align, offset_align } = access else {
        return true;
    };
    iovecs.iter().all(|iovec| {
        iovec.iov_base.addr().is_multiple_of(memory_align as usize)
            && iovec.iov_len.is_multiple_of(offset_align as usize)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A write of `total` bytes in pieces of these lengths, as if the chain had them; addresses start at 0.
    fn transfer(kind: Kind, pieces: &[usize]) -> Transfer {
        let mut at = 0;
        let iovecs = pieces.iter().map(|bytes| {
            let iovec = libc::iovec { iov_base: std::ptr::without_provenance_mut(at), iov_len: *bytes };
            at += bytes;
            iovec
        });
        let iovecs: Vec<_> = iovecs.collect();
        Transfer { kind, iovecs, offset: 4096, left_bytes: at as u64, ..Transfer::new() }
    }

    #[test]
    fn a_short_step_goes_on_where_it_ended() {
        for kind in [Kind::Read, Kind::Write] {
            for step in [1, 511, 512, 1000, 4096, 5000] {
                let mut transfer = transfer(kind, &[512, 4096, 1, 3583]);
                let mut done = 0;
                loop {
                    let (rest, offset, left) = transfer.rest();
                    assert_eq!((offset, left), (4096 + done as u64, 8192 - done as u64));
                    assert_eq!(rest[0].iov_base.addr(), done);
                    assert_eq!(rest.iter().map(|iovec| iovec.iov_len).sum::<usize>(), 8192 - done);
                    let step = step.min(8192 - done);
                    done += step;
                    match transfer.stepped(step as i32) {
                        Next::Step => assert!(done < 8192),
                        Next::Ended(result) => break assert!(result.is_ok() && done == 8192),
                    }
                }
            }
        }
    }

    #[test]
    fn what_cannot_go_on_ends_with_the_reason() {
        for kind in [Kind::Read, Kind::Write] {
            let mut nothing = transfer(kind, &[4096]);
            assert!(
                matches!(nothing.stepped(0), Next::Ended(Err(error)) if error.kind() == io::ErrorKind::UnexpectedEof)
            );
            let mut failed = transfer(kind, &[4096]);
            assert!(matches!(failed.stepped(512), Next::Step));
            assert!(
                matches!(failed.stepped(-libc::EIO), Next::Ended(Err(error)) if error.raw_os_error() == Some(libc::EIO))
            );
            // for ever EAGAIN
            let mut again = transfer(kind, &[4096]);
            let mut steps = 0;
            while let Next::Step = again.stepped(-libc::EAGAIN) {
                steps += 1;
                assert!(steps <= AGAIN_MAX);
            }
        }
    }

    #[test]
    fn extents_follow_each_other_and_a_disk_that_cannot_zero_is_written() {
        let extent = |offset, bytes| Extent { offset, bytes, unmap: true };
        let begun = |kind, through| {
            let mut transfer = Transfer::new();
            transfer.clear(kind, &mut Chain::new(), &[extent(0, 512), extent(8192, 100 << 10)], through);
            transfer
        };
        let ended_well = |next| matches!(next, Next::Ended(Ok(())));

        let mut discard = begun(Kind::Discard, false);
        assert!(matches!(discard.stepped(0), Next::Step));
        assert_eq!((discard.offset, discard.left_bytes), (8192, 100 << 10));
        assert!(ended_well(discard.stepped(0)));
        assert!(ended_well(begun(Kind::Discard, false).stepped(-libc::EOPNOTSUPP)), "a hint");
        assert!(matches!(begun(Kind::Discard, false).stepped(-libc::EIO), Next::Ended(Err(_))));

        let mut zero = begun(Kind::Zero, true);
        assert!(matches!(zero.stepped(0), Next::Step));
        assert!(matches!(zero.stepped(-libc::EOPNOTSUPP), Next::Step));
        assert_eq!((zero.kind, zero.offset), (Kind::WriteZeros, 8192));
        assert!(matches!(zero.stepped(64 << 10), Next::Step));
        assert_eq!((zero.offset, zero.left_bytes), (8192 + (64 << 10), 36 << 10));
        assert!(matches!(zero.stepped(36 << 10), Next::Step));
        assert_eq!(zero.kind, Kind::Sync, "durable when it is answered");
        assert!(ended_well(zero.stepped(0)));
    }
}
