//! libblkio with memory to read into and write from.

use std::ffi::CStr;
use std::fs::File;
use std::mem::MaybeUninit;
use std::os::unix::fs::FileExt;

use blkio::{Blkio, Blkioq, Completion, MemoryRegion, ReqFlags, iovec};

use crate::LIMIT;

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The number that the request was given.
    pub request: usize,
    /// 0, or what went wrong as an errno.
    pub errno: i32,
    /// What the client itself has against the request. It has not been sent then.
    pub refusal: Option<String>,
}

/// Memory that the client shares with the back end.
pub struct Region {
    mapped: MemoryRegion,
    file: File,
}

impl Region {
    /// More memory for a client that has been started; its queues may run.
    pub fn add(blkio: &mut Blkio, bytes: usize) -> Self {
        let mapped = blkio.alloc_mem_region(bytes).unwrap();
        blkio.map_mem_region(&mapped).unwrap();
        // the same memory as a file, so that nobody here has to touch it through a pointer
        let file =
            File::options().read(true).write(true).open(format!("/proc/self/fd/{}", mapped.fd)).unwrap();
        Self { mapped, file }
    }

    /// Takes it back.
    pub fn remove(self, blkio: &mut Blkio) {
        drop(self.file);
        blkio.unmap_mem_region(&self.mapped);
        blkio.free_mem_region(&self.mapped);
    }

    /// What is there.
    pub fn get(&self, at: usize, bytes: usize) -> Vec<u8> {
        let mut data = vec![0; bytes];
        self.file.read_exact_at(&mut data, at as u64).unwrap();
        data
    }

    /// Puts something there.
    pub fn set(&self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.mapped.len);
        self.file.write_all_at(data, at as u64).unwrap();
    }

    fn address(&self, at: usize, bytes: usize) -> *mut u8 {
        assert!(at + bytes <= self.mapped.len);
        (self.mapped.addr + at) as *mut u8
    }
}

/// A queue. Requests have numbers, which come back with the answers.
pub struct Queue {
    queue: Blkioq,
    /// The buffers of what is under way, which the client reads when it finds room in the ring.
    vectors: Vec<Box<[iovec]>>,
}

// SAFETY: the pointers in `vectors` are into regions that live as long as the client, and nobody here follows them.
#[allow(unsafe_code)]
unsafe impl Send for Queue {}

impl Queue {
    /// Reads so many bytes at `offset` into `region` at `at`.
    pub fn read(&mut self, request: usize, offset: u64, region: &Region, at: usize, bytes: usize) {
        self.queue.read(offset, region.address(at, bytes), bytes, request, ReqFlags::empty());
    }

    /// Writes so many bytes of `region` at `at` to `offset`.
    pub fn write(&mut self, request: usize, offset: u64, region: &Region, at: usize, bytes: usize) {
        self.write_with(request, offset, region, at, bytes, ReqFlags::empty());
    }

    /// The same, with flags.
    pub fn write_with(
        &mut self,
        request: usize,
        offset: u64,
        region: &Region,
        at: usize,
        bytes: usize,
        flags: ReqFlags,
    ) {
        self.queue.write(offset, region.address(at, bytes), bytes, request, flags);
    }

    /// Reads into parts of `region`, each a place and a length.
    pub fn readv(&mut self, request: usize, offset: u64, region: &Region, parts: &[(usize, usize)]) {
        let (vector, count) = self.vector(region, parts);
        self.queue.readv(offset, vector, count, request, ReqFlags::empty());
    }

    /// Writes parts of `region`.
    pub fn writev(&mut self, request: usize, offset: u64, region: &Region, parts: &[(usize, usize)]) {
        let (vector, count) = self.vector(region, parts);
        self.queue.writev(offset, vector, count, request, ReqFlags::empty());
    }

    fn vector(&mut self, region: &Region, parts: &[(usize, usize)]) -> (*const iovec, u32) {
        let vector =
            parts.iter().map(|(at, len)| iovec { iov_base: region.address(*at, *len).cast(), iov_len: *len });
        let vector: Box<[iovec]> = vector.collect();
        let start = vector.as_ptr();
        self.vectors.push(vector);
        (start, parts.len() as u32)
    }

    /// Asks that what was written is durable.
    pub fn flush(&mut self, request: usize) {
        self.queue.flush(request, ReqFlags::empty());
    }

    /// Forgets the content of a range.
    pub fn discard(&mut self, request: usize, offset: u64, bytes: u64) {
        self.queue.discard(offset, bytes, request, ReqFlags::empty());
    }

    /// Makes a range zeros.
    pub fn write_zeroes(&mut self, request: usize, offset: u64, bytes: u64, flags: ReqFlags) {
        self.queue.write_zeroes(offset, bytes, request, flags);
    }

    /// Sends what was asked and waits for at least so many answers, at most 64 come.
    pub fn answers(&mut self, at_least: usize) -> Vec<Answer> {
        let mut space: [_; 64] = std::array::from_fn(|_| MaybeUninit::new(NO_COMPLETION));
        let count = self.queue.do_io(&mut space, at_least, Some(&mut LIMIT.clone()), None).unwrap();
        // SAFETY: all have been initialised above, whatever `do_io` has filled since.
        #[allow(unsafe_code)]
        space[..count].iter().map(|completion| answer(unsafe { completion.assume_init_ref() })).collect()
    }

    /// Sends the only request that is under way and waits for its answer: an errno.
    pub fn ended(&mut self) -> i32 {
        let answers = self.answers(1);
        assert!(answers.len() == 1 && answers[0].refusal.is_none(), "{answers:?}");
        self.vectors.clear();
        answers[0].errno
    }
}

const NO_COMPLETION: Completion =
    Completion { user_data: 0, error_msg: std::ptr::null(), ret: 0, reserved_: [0; 12] };

fn answer(completion: &Completion) -> Answer {
    let message = completion.error_msg;
    // SAFETY: an error message that is not null is a constant of libblkio's.
    #[allow(unsafe_code)]
    let refusal =
        (!message.is_null()).then(|| unsafe { CStr::from_ptr(message) }.to_str().unwrap().to_owned());
    Answer { request: completion.user_data, errno: -completion.ret, refusal }
}

/// A started client. Queues are dropped before what they lie in.
pub struct Client {
    /// Its queues, first those that are signalled, then those that are polled.
    pub queues: Vec<Queue>,
    /// Its memory.
    pub region: Region,
    /// The client itself.
    pub blkio: Blkio,
}

impl Client {
    /// Starts a client that has been connected, with `region_bytes` of memory.
    pub fn start(mut blkio: Blkio, signalled: usize, polled: usize, region_bytes: usize) -> Self {
        blkio.set_i32("num-queues", signalled as i32).unwrap();
        blkio.set_i32("num-poll-queues", polled as i32).unwrap();
        let started = blkio.start().unwrap();
        let queues = started.queues.into_iter().chain(started.poll_queues);
        let queues: Vec<_> = queues.map(|queue| Queue { queue, vectors: Vec::new() }).collect();
        assert_eq!(queues.len(), signalled + polled);
        let region = Region::add(&mut blkio, region_bytes);
        Self { queues, region, blkio }
    }

    /// The disk's length as the back end tells it now.
    pub fn capacity(&self) -> u64 {
        self.blkio.get_u64("capacity").unwrap()
    }
}
