variable "name" {
  description = "First part of every name that is made."
  type        = string
  default     = "cxr"
}

variable "nodes" {
  description = "Virtual machines that run all the time."
  type        = number
  default     = 4
}

variable "storage_gb" {
  description = "Persistent volume, GB."
  type        = number
  default     = 100
}

variable "occasional_ip" {
  description = "A second public address."
  type        = bool
  default     = false
}

variable "gpus" {
  description = "GPUs of one block, by purpose."
  type        = object({ training = number, evaluation = number })
  default     = { training = 4, evaluation = 2 }
}

variable "first_monday" {
  description = "The Monday on which the plan of leases starts."
  type        = string
}

variable "weeks" {
  description = "How many weeks of leases are planned."
  type        = number
  default     = 4
}

variable "admin_cidr" {
  description = "The network from which operators come."
  type        = string
}

variable "clinic_cidr" {
  description = "The network from which films come."
  type        = string
}

variable "private_cidr" {
  description = "The private network."
  type        = string
  default     = "10.40.0.0/24"
}

variable "public_key" {
  description = "The operators' SSH key, public part."
  type        = string
}

variable "region" {
  description = "AWS region."
  type        = string
  default     = "eu-central-1"
}

variable "instance_type" {
  description = "Type of the machines: 2 processors and 4 GB, as m1.medium."
  type        = string
  default     = "t3.medium"
}

variable "gpu_instance_type" {
  description = "Type of a machine with GPUs."
  type        = string
  default     = "p4d.24xlarge"
}

variable "gpus_per_instance" {
  description = "GPUs of one such machine."
  type        = number
  default     = 8
}

variable "image_id" {
  description = "Image of the machines (Ubuntu 24.04)."
  type        = string
}

variable "gpu_image_id" {
  description = "Image of the machines with GPUs, with their driver."
  type        = string
}
