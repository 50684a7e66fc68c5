typedef unsigned int u32; typedef unsigned long long u64; typedef unsigned short u16; typedef unsigned char u8;
struct bf16 { u16 x; };
__device__ inline float up(bf16 b){ return __uint_as_float((u32)b.x<<16); }
__device__ inline u32 pack(float a,float b){ u32 r; asm("cvt.rn.bf16x2.f32 %0, %1, %2;":"=r"(r):"f"(b),"f"(a)); return r; }
__constant__ float table[4]={1.f,2.f,3.f,4.f};
__device__ int counter;
extern __shared__ float dyn[];
__device__ float warp_sum(float v){ for(int o=16;o;o>>=1) v+=__shfl_xor_sync(~0u,v,o); return v; }
extern "C" __global__ void rmsnorm(const bf16*x,const bf16*w,bf16*y,int n,float eps){
  __shared__ float part[32];
  const uint4*row=(const uint4*)(x+(size_t)blockIdx.x*n);
  float s=0;
  for(int i=threadIdx.x;i<n/8;i+=blockDim.x){ uint4 v=__ldg(row+i); u32 a[4]={v.x,v.y,v.z,v.w};
    for(int k=0;k<4;k++){ float l=__uint_as_float(a[k]<<16),h=__uint_as_float(a[k]&0xffff0000u); s+=l*l+h*h; } }
  s=warp_sum(s); if((threadIdx.x&31)==0) part[threadIdx.x>>5]=s; __syncthreads();
  if(threadIdx.x<32){ float t=threadIdx.x<blockDim.x/32?part[threadIdx.x]:0.f; t=warp_sum(t); if(threadIdx.x==0) part[0]=t; } __syncthreads();
  float inv=rsqrtf(part[0]/n+eps);
  for(int i=threadIdx.x;i<n;i+=blockDim.x){ float f=up(x[(size_t)blockIdx.x*n+i])*inv*up(w[i]); y[(size_t)blockIdx.x*n+i].x=(u16)(pack(f,0.f)&0xffff); }
}
extern "C" __global__ void misc(float*o,const float*a,const int*b,u64 n,double*dd,u8*bytes,signed char*sb){
  u64 i=blockIdx.x*(u64)blockDim.x+threadIdx.x; if(i>=n) return;
  float x=a[i]; int k=b[i];
  float r=expf(x)+logf(x+2)+sinf(x)+cosf(x)+tanhf(x)+sqrtf(x)+1.f/x+x/3.f+powf(x,1.5f)+exp2f(x)+log2f(x)+floorf(x)+rintf(x)+truncf(x)+fabsf(x)+fmodf(x,0.7f)+fminf(x,2.f)+fmaxf(x,-1.f)+__expf(x)+__fdividef(x,3.f)+erff(x)+log1pf(x);
  int q=k/7+k%5+(k>>2)+(k<<3)+__popc(k)+__clz(k)+__ffs(k)+__brev(k)+__mulhi(k,k)+abs(k)+min(k,3)+max(k,9)+__dp4a(k,k,1)+__byte_perm(k,k*3,0x5410)+__funnelshift_l(k,k,3);
  u64 big=(u64)k*n/(i+1)+n%(i+3)+__popcll(n)+__clzll(n);
  dd[i]=sqrt((double)x)*2.0+(double)big;
  atomicAdd(&counter,1); atomicAdd(o,1.f); atomicMax((int*)o+1,k); atomicCAS((int*)o+2,0,k); atomicExch((int*)o+3,k);
  bytes[i]=(u8)q; sb[i]=(signed char)(k+sb[i]);
  o[i+4]=r+q+table[k&3]+(float)big+__int2float_rn(k)+(float)(u8)k;
  u32 m=__ballot_sync(__activemask(),x>0); if(__any_sync(m,k)) o[i+4]+=__popc(m);
  float loc[8]; for(int j=0;j<8;j++) loc[j]=x*j; o[i+4]+=loc[k&7];
  __threadfence();
}
__device__ __noinline__ float helper(float x,int k){ float s=0; for(int i=0;i<k;i++) s+=x*i; return s; }
extern "C" __global__ void calls(float*o,int k){ o[threadIdx.x]=helper(o[threadIdx.x],k); }
__device__ inline u32 sm(const void*p){ return (u32)__cvta_generic_to_shared(p); }
extern "C" __global__ void mm(const bf16*A,const bf16*B,float*C,int K){
  __shared__ alignas(16) bf16 as[2][16*16], bs[2][8*16];
  float c[4]={0,0,0,0}; int l=threadIdx.x;
  auto load=[&](int k,int s){ 
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"::"r"(sm(&as[s][(l/2)*16+(l&1)*8])),"l"(A+(l/2)*K+k*16+(l&1)*8));
    if(l<16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;"::"r"(sm(&bs[s][(l/2)*16+(l&1)*8])),"l"(B+(l/2)*K+k*16+(l&1)*8));
    asm volatile("cp.async.commit_group;"); };
  load(0,0);
  for(int k=0;k<K/16;k++){ if(k+1<K/16){ load(k+1,(k+1)&1); asm volatile("cp.async.wait_group 1;":::"memory"); } else asm volatile("cp.async.wait_group 0;":::"memory");
    __syncthreads();
    u32 a0,a1,a2,a3,b0,b1; 
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];":"=r"(a0),"=r"(a1),"=r"(a2),"=r"(a3):"r"(sm(&as[k&1][(l&15)*16+(l>>4)*8])));
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0,%1}, [%2];":"=r"(b0),"=r"(b1):"r"(sm(&bs[k&1][(l&7)*16+((l>>3)&1)*8])));
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};":"+f"(c[0]),"+f"(c[1]),"+f"(c[2]),"+f"(c[3]):"r"(a0),"r"(a1),"r"(a2),"r"(a3),"r"(b0),"r"(b1));
    __syncthreads(); }
  int g=l>>2,t=l&3; C[g*8+t*2]=c[0]; C[g*8+t*2+1]=c[1]; C[(g+8)*8+t*2]=c[2]; C[(g+8)*8+t*2+1]=c[3];
}
