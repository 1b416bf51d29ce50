// The microphone's samples, at whatever rate, as PCM of 16 bits at 24,000 Hz and how loud it is.
const RATE = 24000;
const PIECE = 960; // samples: 40 ms

registerProcessor(
  "mico-ear",
  class extends AudioWorkletProcessor {
    pcm = new Int16Array(PIECE);
    n = 0;
    sum = 0;
    power = 0;
    step = sampleRate / RATE;
    room = this.step; // what of the next sample is not summed up yet, in samples of the device

    process([[samples]]) {
      for (const sample of samples || []) {
        let left = 1;
        while (left >= this.room - 1e-9) {
          this.put((this.sum + sample * this.room) / this.step);
          left -= this.room;
          [this.sum, this.room] = [0, this.step];
        }
        this.sum += sample * left;
        this.room -= left;
      }
      return true;
    }

    put(sample) {
      this.pcm[this.n++] = Math.max(-1, Math.min(1, sample)) * 32767;
      this.power += sample * sample;
      if (this.n < PIECE) return;
      this.port.postMessage({ pcm: this.pcm.slice(), level: Math.sqrt(this.power / PIECE) });
      this.n = this.power = 0;
    }
  },
);
