//! The virtio block device that the vhost-user server shows to the frontend: features and configuration space (virtio
//! 1.2 §5.2.3 and §5.2.4). What is done with it is the backend's business.

use colo::vhost_user::{Device, FrontendChannel, Ring};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_CONFIG_WCE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH,
    VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_SIZE_MAX, VIRTIO_BLK_F_TOPOLOGY,
    VIRTIO_BLK_F_WRITE_ZEROES,
};

use crate::backend::Backend;
use crate::block_buffer::SECTOR_BYTES;
use crate::request::{
    DISCARD_EXTENTS_MAX, DISCARD_SECTORS_MAX, SEGMENT_BYTES_MAX, SEGMENTS_MAX, ZEROES_EXTENTS_MAX,
    ZEROES_SECTORS_MAX,
};

/// Where `writeback` is in the configuration space.
const WRITEBACK_AT: u32 = 32;

impl Device for Backend {
    fn queues(&self) -> usize {
        self.queues()
    }

    fn features(&self) -> u64 {
        let mut bits = vec![
            VIRTIO_BLK_F_SIZE_MAX,
            VIRTIO_BLK_F_SEG_MAX,
            VIRTIO_BLK_F_BLK_SIZE,
            VIRTIO_BLK_F_TOPOLOGY,
            VIRTIO_BLK_F_FLUSH,
            VIRTIO_BLK_F_CONFIG_WCE,
        ];
        if self.queues() > 1 {
            bits.push(VIRTIO_BLK_F_MQ);
        }
        if self.shared.image.read_only() {
            bits.push(VIRTIO_BLK_F_RO);
        } else {
            bits.extend([VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES]);
        }
        bits.iter().map(|bit| 1 << bit).sum()
    }

    /// `struct virtio_blk_config`, up to the fields that we have features for.
    fn config_bytes(&self) -> Vec<u8> {
        let image = &self.shared.image;
        let topology = image.topology();
        let sector_bytes = SECTOR_BYTES as u32;
        // what is discarded or zeroed begins and ends at a block; a finer grain than the disk's own frees nothing
        let discard_sectors = image.discard_bytes_granularity().max(image.block_bytes()) / sector_bytes;
        let may_unmap = image.discard_bytes_granularity() > 0;
        let mut config = Vec::with_capacity(60);
        config.extend((image.bytes() / u64::from(sector_bytes)).to_le_bytes()); // capacity
        config.extend(SEGMENT_BYTES_MAX.to_le_bytes()); // size_max
        config.extend(SEGMENTS_MAX.to_le_bytes()); // seg_max
        config.extend([0; 4]); // geometry
        config.extend(image.block_bytes().to_le_bytes()); // blk_size
        config.extend([topology.physical_block_exp, topology.alignment_offset]);
        config.extend(topology.min_io_blocks.to_le_bytes());
        config.extend(topology.opt_io_blocks.to_le_bytes());
        config.push(u8::from(self.shared.write_cache.writeback())); // writeback
        config.push(0); // unused0
        config.extend((self.queues() as u16).to_le_bytes()); // num_queues
        config.extend(DISCARD_SECTORS_MAX.to_le_bytes()); // max_discard_sectors
        config.extend(DISCARD_EXTENTS_MAX.to_le_bytes()); // max_discard_seg
        config.extend(discard_sectors.to_le_bytes()); // discard_sector_alignment
        config.extend(ZEROES_SECTORS_MAX.to_le_bytes()); // max_write_zeroes_sectors
        config.extend(ZEROES_EXTENTS_MAX.to_le_bytes()); // max_write_zeroes_seg
        config.extend([u8::from(may_unmap), 0, 0, 0]); // write_zeroes_may_unmap, unused1
        config
    }

    fn frontend_channel(&self) -> Option<&FrontendChannel> {
        Some(&self.channel)
    }

    /// The driver switches the write cache (§5.2.5.2): from the next request on every write is durable when it is
    /// answered, or need not be.
    fn write_config(&self, offset: u32, data: &[u8]) -> Result<(), String> {
        match (offset, data) {
            (WRITEBACK_AT, [writeback @ 0..=1]) => self.set_write_cache(*writeback == 1),
            _ => Err(format!("{} bytes at {offset}: only writeback can be written, 0 or 1", data.len())),
        }
    }

    fn tracks_inflight(&self) -> bool {
        true
    }

    fn config_read(&self) {
        self.told();
    }

    fn set_features(&self, features: u64) {
        let has = |bit: u32| features & 1 << bit != 0;
        self.shared.write_cache.negotiated(has(VIRTIO_BLK_F_FLUSH), has(VIRTIO_BLK_F_CONFIG_WCE));
    }

    fn start_queue(&self, index: usize, ring: Ring) -> Result<(), String> {
        self.start_ring(index, ring).map_err(|error| error.to_string())
    }

    fn stop_queue(&self, index: usize) -> u16 {
        self.stop_ring(index)
    }

    fn quiesced(&self) {
        self.release();
    }
}
